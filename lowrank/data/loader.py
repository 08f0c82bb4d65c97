"""An iterator of batches whose position is saved."""

import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from lowrank.core.errors import UserError, plural
from lowrank.core.typing import HostArrays
from lowrank.data.config import DataConfig
from lowrank.data.examples import Examples
from lowrank.data.row_format import RowFormat
from lowrank.data.templates import Record


class Loader:
    """Global batches, without end or for `epochs`, and a state that continues them exactly.

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
        self.labels, self.stats, self.shapes = examples.labels, examples.stats(), shapes
        self._examples, self._said = examples, len(examples.dropped)
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

    def record(self, number: int) -> tuple[Record, str]:
        """The record of this number, as `row_format.RECORD` holds it, and its place for a reader."""
        return self._examples.record(number)

    def describe(self) -> str:
        """What is learned: counts, and one record."""
        counts = {name: count for name, count in self.stats.items() if count and name not in ("examples", "measured")}
        measured, size = self.stats["measured"], self.stats["examples"]
        share = "" if measured == size else f" (of {measured:,} of them)"
        found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        lines = [f"data: {size:,} examples; {found}{share}", *self._examples.shares(), self._examples.preview()]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What was left out since the last call, one line a record."""
        left_out = list(self._examples.dropped.values())[self._said :]
        self._said += len(left_out)
        return [f"left out: {why}" for why in left_out]

    def close(self) -> None:
        """Stops the thread that makes batches ahead; the iterator ends."""
        self._stop()

    def _start(self) -> None:
        self._live = [iter(self._batches)]
        self._stop = weakref.finalize(self, _end, self._live)  # at exit too: a thread must not outlive the modules


class PlannedLoader:
    """The shapes of a config's batches, without any data: a run with this loader can be planned and never started."""

    def __init__(self, config: DataConfig, row_format: RowFormat, max_positions: int) -> None:
        """Raises UserError for rows that are longer than `max_positions`, the model's."""
        check_length(config, max_positions)
        shapes = row_format.shapes(config)
        self.labels, self.stats = tuple(config.labels), {"sequences": 1, "tokens": config.seq_len}
        self.shapes = {name: ((config.batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def check_length(config: DataConfig, max_positions: int) -> None:
    """Raises UserError if a config's rows are longer than the model's positions."""
    if config.seq_len > max_positions:
        raise UserError(f"data.seq_len={config.seq_len} exceeds the model's {plural(max_positions, 'position')}")


def _end(live: list[grain.DatasetIterator]) -> None:
    while live:
        live.pop().close()
