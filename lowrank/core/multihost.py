"""What each process of a run gives to all, and gets back."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lowrank.core.errors import UserError


def gather(host: Any) -> list[Any]:
    """What each process gave as `host`, in process order, on every process."""
    if jax.process_count() == 1:
        return [host]
    text = np.frombuffer(json.dumps(host).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def own(hosts: list[Any]) -> Any:
    """This process's entry. With another number of processes only an entry that all shared has a meaning."""
    if len(hosts) == jax.process_count():
        return hosts[jax.process_index()]
    if any(host != hosts[0] for host in hosts):
        raise UserError(f"the checkpoint has data states of {len(hosts)} processes, this run has {jax.process_count()}")
    return hosts[0]
