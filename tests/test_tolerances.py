"""Every tolerance of the tests is that of `tests/support/close.py`: relative to the size of the compared values."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.close import assert_close, difference, worst

ROOT = Path(__file__).parent
PRIVATE = ROOT / "support" / "gpu_interpreter.py"  # the one file that imports private modules of jax
BARE = re.compile(r"atol|rtol|approx\(|allclose|isclose|almost_equal|max_ulp|\b_src\b|importorskip|skipif")


def test_no_test_has_a_tolerance_of_its_own_a_private_module_or_a_skip():
    files = [path for path in ROOT.rglob("*.py") if path not in (Path(__file__), PRIVATE)]
    lines = [(path, line) for path in files for line in path.read_text().splitlines()]
    assert [f"{path.relative_to(ROOT)}: {line.strip()}" for path, line in lines if BARE.search(line)] == []


def test_a_difference_is_measured_against_the_largest_magnitude():
    small = np.float32([100.0, 1e-3]), np.float32([100.0, 2e-3])
    assert 0.9e-5 < difference(*small) < 1.1e-5
    assert_close(*small, relative=2e-5)
    with pytest.raises(AssertionError, match=r"differs by 0.5 of its size"):
        assert_close(*small, relative=2e-5, per_element=True)
    with pytest.raises(AssertionError, match=r"differs by 0.001 of its size 1"):
        assert_close(*small, relative=2e-5, size=1)


def test_leaves_are_compared_by_name_and_shape():
    tree = {"a": [1.0, 2.0], "b": (np.ones(3), np.inf)}
    assert_close(tree, {"a": np.array([1.0, 2.0]), "b": (np.ones(3), np.inf)})
    with pytest.raises(AssertionError, match=r"leaves \['a'\], expected \['b'\]"):
        assert_close({"a": 1}, {"b": 1})
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(3,\)"):
        assert_close(np.ones(2), np.ones(3))
    with pytest.raises(AssertionError, match="a/b differs by nan"):
        assert_close({"a": {"b": np.nan}}, {"a": {"b": 1.0}})


def test_the_log_keeps_the_worst_of_each_call(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CLOSE_LOG", str(tmp_path / "log"))
    for gap in (1e-6, 3e-6, 2e-6):
        assert_close(1 + gap, 1.0)
    [(place, (seen, allowed, size))] = worst(tmp_path / "log").items()
    assert place.startswith(__file__)
    assert (round(seen, 8), allowed, size) == (3e-6, 5e-6, 1.0)
