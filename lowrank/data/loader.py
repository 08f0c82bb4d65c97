"""An iterator of batches whose position is saved."""

import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.data.examples import Examples


class Loader:
    """Batches of this host, without end or for `epochs`, and a state that continues them exactly.

    `labels` are the names of the classes in order, `stats` the counts of `Examples.stats`. `shapes` gives
    `(shape, dtype)` of each array of a batch: those of the row format, and `valid` int32 `[B]`, which is 0 on the rows
    that only fill up the last batch.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        examples: Examples,
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]],
        identity: dict[str, Any],
    ) -> None:
        """`identity` holds the settings that the batches depend on, for `set_state` to compare."""
        self._batches, self._identity = batches, identity
        self.labels, self.stats, self.shapes = examples.encoder.labels, examples.stats(), shapes
        self._start()

    def __iter__(self) -> Iterator[HostArrays]:
        return self

    def __next__(self) -> HostArrays:
        if not self._live:
            raise StopIteration
        return next(self._live[0])

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, ready for JSON."""
        return {"data": self._identity, "iterator": self._live[0].get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called. Raises UserError for a state of other data or settings."""
        for name, value in self._identity.items():
            if (saved := state["data"].get(name)) != value:
                raise UserError(f"the saved data state is of other data: data.{name} was {saved!r}, is {value!r}")
        self.close()
        self._start()
        self._live[0].set_state(state["iterator"])

    def close(self) -> None:
        """Stops the thread that makes batches ahead; the iterator ends."""
        self._stop()

    def _start(self) -> None:
        self._live = [iter(self._batches)]
        self._stop = weakref.finalize(self, _end, self._live)  # at exit too: a thread must not outlive the modules


def _end(live: list[grain.DatasetIterator]) -> None:
    while live:
        live.pop().close()
