"""An iterator of batches whose position is saved."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.data.encoded import Examples


class Loader:
    """Batches of this host, without end or for `epochs`, and a state that continues them exactly.

    `labels` are the class names in order, `stats` what was counted (`Examples.stats`). A batch has `tokens, segments`
    int32 `[B,T]`; for causal_lm also `targets, positions` int32 and `weights` float32 `[B,T]`, for classification
    `labels` int32 `[B]`; `valid` int32 `[B]` is 0 on rows that only fill up the last batch.
    """

    def __init__(self, batches: grain.IterDataset, examples: Examples, identity: dict[str, Any]) -> None:
        self._batches, self._identity = batches, identity
        self.labels, self.stats = examples.labels, examples.stats()
        self._start()

    def __iter__(self) -> Iterator[HostArrays]:
        return self

    def __next__(self) -> HostArrays:
        if not self._live:
            raise StopIteration
        return next(self._live[0])

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """`(shape, dtype)` of each array of a batch. The next batch stays the next."""
        start = self.get_state()
        first = next(self)
        self.set_state(start)
        return {name: (x.shape, x.dtype) for name, x in first.items()}

    def get_state(self) -> dict[str, Any]:
        """Where the next batch starts, for JSON."""
        return {"data": self._identity, "iterator": self._live[0].get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch before `get_state`. Raises UserError for a state of other data or settings."""
        for name, value in self._identity.items():
            if (saved := state["data"].get(name)) != value:
                raise UserError(f"the saved data state is of other data: data.{name} was {saved!r}, is {value!r}")
        self.close()
        self._start()
        self._live[0].set_state(state["iterator"])

    def close(self) -> None:
        """Stops the thread that makes batches ahead; there are no more."""
        self._stop()

    def _start(self) -> None:
        self._live = [iter(self._batches)]
        self._stop = weakref.finalize(self, _end, self._live)  # at exit too: threads must not outlive the modules


def _end(live: list[grain.DatasetIterator]) -> None:
    while live:
        live.pop().close()
