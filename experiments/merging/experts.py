"""Adapters of the tasks: one for each task and seed, and one of all tasks, whose batches take turns.

All runs share one compiled step, and an adapter that is on the disk is not trained again. A joint run takes as many
steps as the experts of its seed together.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.merging import tasks
from experiments.merging.sizes import Size
from lowrank import methods
from lowrank.adapters import adapter_files
from lowrank.core import tree
from lowrank.core.files import scratch_beside
from lowrank.core.typing import Batch, Network, PyTree
from lowrank.models import build_model
from lowrank.objectives import causal_lm
from lowrank.pretrained import Pretrained

METHOD = {"name": "lora", "rank": 8, "alpha": 16.0, "target": r"layers/attn/(q|v)/kernel"}
RATE, WARMUP, CLIP, CHUNK_TOKENS = 3e-3, 2, 1.0, 96
OPTIMIZER = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam())


def train(base: Pretrained, size: Size, names: Sequence[str], seed: int, folder: Path) -> None:
    """Trains an adapter on the tasks of these names in turn, and writes it to a folder, unless that exists."""
    if folder.exists():
        return
    method = methods.build_method(METHOD)
    params = methods.attach(method, base.params, jax.random.key(seed))
    mask = methods.trainable_mask(method, params)
    trained, frozen = tree.split(params, mask)
    state, network, steps = OPTIMIZER.init(trained), build_model(base.config), size.steps * len(names)
    batches = _in_turn(base, size, names, seed)
    for i in range(steps):
        rate = RATE * min((i + 1) / WARMUP, 1.0) * (1 - i / steps)
        trained, state = _step(network, trained, state, frozen, next(batches), jnp.float32(rate))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(folder, folder=True) as scratch:
        adapter_files.save(tree.join(trained, frozen), base, scratch, mask=mask, method=METHOD)
        scratch.rename(folder)


def _in_turn(base: Pretrained, size: Size, names: Sequence[str], seed: int) -> Iterator[Mapping[str, Any]]:
    shape = {"length": size.length, "batch_size": size.batch, "rows": 0}
    loaders = [tasks.loader(name, base.tokenizer, split="train", seed=seed, **shape) for name in names]
    while True:
        for one in loaders:
            yield dict(next(one))


@functools.partial(jax.jit, static_argnums=0)
def _step(
    network: Network, trained: PyTree, state: PyTree, frozen: PyTree, batch: Batch, rate: jax.Array
) -> tuple[PyTree, PyTree]:
    def loss(trained: PyTree) -> jax.Array:
        sums = causal_lm().loss(network, tree.join(trained, frozen), batch, CHUNK_TOKENS)
        return sums.total / sums.weight

    updates, state = OPTIMIZER.update(jax.grad(loss)(trained), state)
    return jax.tree.map(lambda x, u: x - rate * u, trained, updates), state
