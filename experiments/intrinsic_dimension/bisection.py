"""The search for the smallest dimension that is enough, among powers of two, by bisection.

It takes for granted that what a dimension reaches a larger one does too. A single run decides at each dimension: the
noise of the runs shows in how far the results of the seeds lie apart.
"""

from collections.abc import Mapping, Sequence


def next_dimension(candidates: Sequence[int], reached: Mapping[int, bool]) -> int | None:
    """The dimension to try next, or None when the search has ended. `reached` has the answers so far."""
    low, high = bounds(candidates, reached)
    return None if low == high else candidates[(low + high) // 2]


def bounds(candidates: Sequence[int], reached: Mapping[int, bool]) -> tuple[int, int]:
    """`(low, high)`: the index of the smallest dimension that is enough lies in [low, high].

    The index `len(candidates)` stands for more than all of them.
    """
    low, high = 0, len(candidates)
    for i, dimension in enumerate(candidates):
        if dimension in reached:
            low, high = (low, min(high, i)) if reached[dimension] else (max(low, i + 1), high)
    return low, max(low, high)


def smallest(candidates: Sequence[int], reached: Mapping[int, bool]) -> int | None:
    """The smallest dimension that was found to be enough; None if none was, or the search has not ended."""
    low, high = bounds(candidates, reached)
    return candidates[low] if low == high < len(candidates) else None
