"""The scores of a model on held-out batches, as an objective defines them.

Batches are those of `lowrank.data`: all of one shape, so that each program compiles once. Sums are taken inside the
program, over the rows of all hosts.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from lowrank.core import sharding
from lowrank.core.typing import Batch, BatchInfo, Bind, Network, PyTree
from lowrank.metrics import check_not_empty
from lowrank.objectives import Objective

Put = Callable[[Batch], Mapping[str, jax.Array]]  # a batch -> arrays on the devices
CHUNK_TOKENS = 1024


def evaluate(
    objective: Objective,
    network: Network,
    params: PyTree,
    batches: Iterable[Batch],
    *,
    bind: Bind | None = None,
    put: Put = dict,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, float]:
    """The objective's scores by name over the batches, with `bind`, a method's, applied to the parameters.

    About `chunk_tokens` tokens at a time have their logits in memory; 0: all of a batch's. Raises UserError where
    there is nothing to score.
    """
    score, total = objective.score, None
    with sharding.mesh_context(params):
        sums = partial(_sums, score.sums, objective.batch_info, network, bind, chunk_tokens, params)
        for batch in batches:
            one = jax.tree.map(_to_64_bits, sums(put(batch)))
            total = one if total is None else jax.tree.map(np.add, total, one)
    check_not_empty(total is not None)
    return score.summarize(total)


def row_values(
    objective: Objective,
    network: Network,
    params: PyTree,
    batch: Batch,
    *,
    bind: Bind | None = None,
    put: Put = dict,
    chunk_tokens: int = CHUNK_TOKENS,
) -> np.ndarray:
    """`Comparison.row_values` of one batch, `[B, ...]` float32, for an objective that compares with a reference."""
    assert objective.comparison is not None
    values = objective.comparison.row_values
    with sharding.mesh_context(params):
        found = _replicated_values(values, objective.batch_info, network, bind, chunk_tokens, params, put(batch))
    return np.asarray(found)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _replicated_values(*arguments: Any) -> jax.Array:
    return sharding.replicate(_sums(*arguments))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sums(
    sums: Callable[[Network, PyTree, Batch, int], PyTree],
    batch_info: Callable[[Batch], BatchInfo],
    network: Network,
    bind: Bind | None,
    chunk_tokens: int,
    params: PyTree,
    batch: Batch,
) -> PyTree:
    params = bind(params, batch_info(batch), None) if bind else params
    return sums(network, params, batch, chunk_tokens)


def _to_64_bits(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)
