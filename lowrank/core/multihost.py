"""Values that each process of a run shares with all others, and the recovery of its own."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lowrank.core.errors import UserError, plural


def gather_values(value: Any) -> list[Any]:
    """The JSON values of all processes, in process order, on every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What one process refuses in this block, all refuse: every process raises the UserError of the first that does.

    Nothing in the block may wait for another process.
    """
    error = None
    try:
        yield
    except UserError as e:
        error = e
    told = gather_values(None if error is None else [type(error).__name__, str(error)])
    if error is not None:
        raise error
    if first := next((each for each in told if each), None):
        kinds: dict[str, type[UserError]] = {kind.__name__: kind for kind in UserError.__subclasses__()}
        raise kinds.get(first[0], UserError)(first[1])


def own_value(values: list[Any]) -> Any:
    """The value of this process among those that `gather_values` returned, perhaps to another number of processes.

    Raises UserError if the numbers differ and the values are not all the same.
    """
    if len(values) == jax.process_count():
        return values[jax.process_index()]
    if any(value != values[0] for value in values):
        saved, ours = (plural(n, "process") for n in (len(values), jax.process_count()))
        raise UserError(f"the checkpoint has data states of {saved}, and this run has {ours}: start as many")
    return values[0]
