"""Where a record is in several parts that follow one another."""

import bisect
import itertools
from collections.abc import Iterable


class Concatenation:
    """Parts of these `sizes`; `len` is that of all together."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def find(self, index: int) -> tuple[int, int]:
        """`(number of the part, index in it)`. Raises IndexError for an index that is in none."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)
