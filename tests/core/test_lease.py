"""A folder of a bucket has one owner at a time, also where an owner is killed or paused."""

import json
import time

import pytest

from lowrank.core import paths
from lowrank.core.errors import UserError
from lowrank.core.generations import create_exclusive, read_version, replace_if
from lowrank.core.lease import Lease

SECONDS = 1.0


@pytest.fixture(params=["local", "bucket"])
def path(request, tmp_path):
    folder = str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return f"{folder}/.lock"


def test_a_lease_that_is_renewed_is_refused_to_others_and_given_back(path):
    for _ in range(2):  # the second time, the lease is free at once
        with Lease(path, SECONDS) as lease:
            first = read_version(path).generation
            with pytest.raises(UserError, match=r"is in use by another run \(process \d+ on .*\): wait for it"):
                Lease(path, SECONDS).__enter__()
            assert read_version(path).generation > first
            lease.check()
        assert json.loads(paths.read_text(path)) is None


def test_the_lease_of_a_killed_process_ends(path, capsys):
    create_exclusive(path, json.dumps({"host": "gone", "pid": 1, "id": "x"}).encode())
    began = time.monotonic()
    with Lease(path, SECONDS) as lease:
        lease.check()
    assert time.monotonic() - began > SECONDS / 2
    assert "a killed run may have held" in capsys.readouterr().err


def test_a_process_that_was_paused_for_too_long_finds_another_owner(path):
    with Lease(path, 1000.0) as paused:
        other = json.dumps({"host": "other", "pid": 2, "id": "y"}).encode()
        replace_if(path, other, read_version(path).generation)
        paused._renewed -= 900.0
        with pytest.raises(UserError, match=r"in use by another run \(process 2 on other\)"):
            paused.check()
    assert paths.read_bytes(path) == other
