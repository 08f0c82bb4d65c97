"""Claims by lease: one owner at a time, and a result that no other owner can replace, on a disk and in a bucket."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from lowrank.core.paths import as_path
from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.study import Limits

LIMITS = Limits(lease=5.0)


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return tmp_path if request.param == "disk" else as_path(request.getfixturevalue("bucket")) / "study"


def test_an_owner_that_has_lost_its_claim_cannot_write_a_result(folder):
    ledger = Ledger(folder, LIMITS)
    history = lambda: ledger.histories(["key"])["key"]  # noqa: E731
    assert history().events == ()
    slow = ledger.claim(history(), "slow", now=0.0)
    now = history().seen + LIMITS.lease
    assert ledger.claim(history(), "fast", now - 0.1) is None
    fast = ledger.claim(history(), "fast", now + 0.1)
    assert (fast.number, history().stops) == (2, 1)
    assert not ledger.renew(slow, {})
    assert not ledger.close(slow, "done", summary={"final_loss": 1.0})
    assert ledger.renew(fast, {"step": 3})
    assert ledger.progress(history()) == {"step": 3}
    assert ledger.close(fast, "done", summary={"final_loss": 2.0})
    assert not ledger.close(fast, "done", summary={"final_loss": 3.0})
    assert Ledger(folder, LIMITS).histories(["key"])["key"].last["summary"] == {"final_loss": 2.0}
    assert ledger.claim(history(), "third", now + 1e9) is None


def test_of_many_workers_one_gets_a_claim(folder):
    keys = [f"key{i}" for i in range(4)]

    def take(owner):
        ledger = Ledger(folder, LIMITS)
        return [ledger.claim(history, owner, 0.0) for history in ledger.histories(keys).values()]

    with ThreadPoolExecutor(6) as pool:
        claims = list(pool.map(take, [f"owner{i}" for i in range(6)]))
    for i, key in enumerate(keys):
        owners = [found[i].owner for found in claims if found[i]]
        assert len(owners) == 1
        assert Ledger(folder, LIMITS).histories([key])[key].last["owner"] == owners[0]
