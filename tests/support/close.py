"""The one tolerance of the tests: a difference is measured against the size of the compared values.

Processors and library versions add in different orders, so an absolute tolerance that holds on one machine fails on
another as soon as the values are large. `assert_close` divides the largest difference of a leaf by the largest
magnitude of the expected leaf, both in float64, and fails above `relative`.

Set `LOWRANK_CLOSE_LOG` to a file's name and each comparison appends a line to it: the place of the call, the relative
difference, the allowed one and the size. `python -m tests.support.close FILE` lists the calls whose margin is below 4.
"""

import functools
import os
import pathlib
import sys

import jax
import numpy as np

from lowrank.core import tree

FLOAT32 = 5e-6  # forty float32 roundings of the largest value, in whatever order sums are added
MARGIN = 4  # an allowed difference is at least this many times the largest one that was seen


def assert_close(actual, expected, *, relative: float = FLOAT32, size=None, per_element: bool = False, name: str = ""):
    """Hold each leaf of `actual` to the same leaf of `expected`, two trees of arrays with the same leaf names.

    A list is one array. `size` stands in for the largest magnitude of an expected leaf, for a difference of larger
    values, say. With `per_element` each element is measured against its own magnitude.

    Raises:
        AssertionError: a leaf is missing, has another shape, or differs by more than `relative` of its size.
    """
    actual, expected = _leaves(actual), _leaves(expected)
    assert list(actual) == list(expected), f"leaves {list(actual)}, expected {list(expected)}"
    frame = sys._getframe(1)
    for leaf, want in expected.items():
        seen, scale = _compare(actual[leaf], want, size, per_element)
        _log(frame, seen, relative, scale)
        if not seen <= relative:
            shown = " ".join(filter(None, [name, leaf])) or "the array"
            raise AssertionError(
                f"{shown} differs by {seen:.3g} of its size {scale:.4g}, and {relative:.3g} is allowed:\n"
                f"{actual[leaf]}\nexpected\n{want}"
            )


def assert_same(actual, expected):
    """Hold each leaf of `actual` to the same leaf of `expected`, bit for bit."""
    actual, expected = dict(tree.named_leaves(actual)), dict(tree.named_leaves(expected))
    assert actual.keys() == expected.keys()
    for leaf, want in expected.items():
        np.testing.assert_array_equal(np.asarray(actual[leaf]), np.asarray(want), err_msg=leaf)


def difference(actual, expected) -> float:
    """The largest difference of two arrays, broadcast, relative to the largest magnitude of `expected`."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def _leaves(values) -> dict[str, np.ndarray]:
    pairs = jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda x: isinstance(x, list))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.asarray(leaf).astype(np.float64) for path, leaf in pairs}


def _compare(actual, expected, size, per_element) -> tuple[float, float]:
    assert expected.ndim == 0 or actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if not actual.size:
        return 0.0, 0.0
    with np.errstate(invalid="ignore", divide="ignore"):  # the same infinity on both sides is no difference
        gap = np.where(actual == expected, 0.0, np.abs(actual - expected))
        magnitude = np.abs(expected)
        scale = float(np.max(magnitude[np.isfinite(magnitude)], initial=0.0)) if size is None else float(size)
        seen = np.where(gap == 0, 0.0, gap / (magnitude if per_element else scale))
    return float(np.max(seen)), scale


def _log(frame, seen, relative, scale):
    if path := os.environ.get("LOWRANK_CLOSE_LOG"):
        with open(path, "a") as log:
            log.write(f"{frame.f_code.co_filename}:{frame.f_lineno}\t{seen}\t{relative}\t{scale}\n")


def worst(log: str) -> dict[str, tuple[float, float, float]]:
    """For each place in the log the largest difference that was seen, the allowed one and the size there."""
    found = {}
    for line in pathlib.Path(log).read_text().splitlines():
        place, *numbers = line.split("\t")
        seen, relative, scale = map(float, numbers)
        if place not in found or seen / relative >= found[place][0] / found[place][1]:
            found[place] = seen, relative, scale
    return found


if __name__ == "__main__":
    for place, (seen, relative, scale) in sorted(worst(sys.argv[1]).items()):
        if seen * MARGIN > relative:
            print(f"{place}: {seen:.3g} of {scale:.4g}, allowed {relative:.3g}")
