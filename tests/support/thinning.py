"""The cases that `make test` leaves to `make test-all`: combinations of parts that other cases test apart."""

from collections.abc import Collection, Iterable

import pytest


def keep(cases: Iterable[str], kept: Collection[str]) -> list:
    """The cases as parameters of a test; those outside `kept` carry the mark `all`."""
    cases = list(cases)
    assert set(kept) <= set(cases), f"{sorted(set(kept) - set(cases))} are not among the cases"
    return [name if name in kept else pytest.param(name, marks=pytest.mark.all) for name in cases]


def leave(cases: Iterable[str], left: Collection[str]) -> list:
    """The cases as parameters of a test; those in `left` carry the mark `all`."""
    cases = list(cases)
    assert set(left) <= set(cases), f"{sorted(set(left) - set(cases))} are not among the cases"
    return keep(cases, set(cases) - set(left))
