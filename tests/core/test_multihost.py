"""Processes of one run agree on what they refuse."""

import pytest

from lowrank.core import multihost
from lowrank.core.errors import InUse, UserError


@pytest.fixture
def others(monkeypatch):
    """`others(told)`: what the other process tells."""
    return lambda told: monkeypatch.setattr(multihost, "gather_values", lambda value: [value, told])


def test_what_this_process_refuses_is_its_own_error(others):
    others(["InUse", "held"])
    mine = UserError("mine")
    with pytest.raises(UserError) as found, multihost.agreed():
        raise mine
    assert found.value is mine


def test_what_another_process_refuses_is_raised_here_with_its_kind(others):
    others(["InUse", "held"])
    with pytest.raises(InUse, match="held"), multihost.agreed():
        pass


def test_nothing_happens_where_nobody_refuses(others):
    others(None)
    with multihost.agreed():
        done = True
    assert done
