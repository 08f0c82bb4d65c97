"""The models of the study in memory: kernels merged by a rule, put into the base, and scored on every task."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from experiments.merging import tasks
from experiments.merging.sizes import Merge, Size
from launch import merge_statistics
from lowrank.core import tree
from lowrank.core.typing import Batch, Network, PyTree
from lowrank.merging import parameters, statistics
from lowrank.merging.adapter_source import AdapterSource, tensor_name
from lowrank.merging.checkpoint import Checkpoint
from lowrank.merging.recipe import ModelSpec
from lowrank.merging.rule import Group
from lowrank.merging.rules import RULES
from lowrank.models import build_model
from lowrank.pretrained import Pretrained
from lowrank.pretrained.families import FAMILIES
from lowrank.pretrained.hf_tensors import Tensor

Kernels = Mapping[str, np.ndarray]  # by the names and in the layout of Hugging Face


@dataclasses.dataclass(frozen=True)
class World:
    """The base, its checkpoint, the kernels that adapters change, and the batches of every task on two splits."""

    size: Size
    base: Pretrained
    checkpoint: Checkpoint
    batches: Mapping[tuple[str, str], Sequence[Batch]]  # (text, split) -> batches

    @property
    def adapted(self) -> list[Tensor]:
        """The leaves that the adapters change."""
        tensors = FAMILIES[self.base.family].tensors(self.base.config)
        return [t for t in tensors if t.leaf in ("layers/attn/q/kernel", "layers/attn/v/kernel")]

    def kernels(self) -> Kernels:
        """The base's kernels, a copy."""
        return {name: self.checkpoint.read(name) for tensor in self.adapted for name in tensor.names}

    def with_kernels(self, kernels: Kernels) -> PyTree:
        """The base's parameters with these kernels in place of its own."""
        leaves = {
            t.leaf: jnp.asarray(np.stack([kernels[n].T if t.transpose else kernels[n] for n in t.names]), jnp.float32)
            for t in self.adapted
        }
        return tree.map_named(lambda name, leaf: leaves.get(name, leaf), self.base.params)

    def nll(self, models: Sequence[PyTree], text: str, split: str) -> float:
        """The mean negative log-likelihood in nats per token, of the mean of the models' probabilities."""
        network, total, weight = build_model(self.base.config), 0.0, 0.0
        for batch in self.batches[text, split]:
            of = np.stack([np.asarray(_log_probabilities(network, params, batch), np.float64) for params in models])
            mean = np.logaddexp.reduce(of, axis=0) - np.log(len(models))
            total, weight = total - float(np.sum(mean * batch["weights"])), weight + float(np.sum(batch["weights"]))
        return total / weight

    def scores(self, models: Sequence[PyTree]) -> dict[str, float]:
        """`nll` of every text on the test split."""
        return {text: self.nll(models, text, "test") for text in tasks.TEXTS}


def load(size: Size) -> World:
    """The world of a size. Reads the model and the data."""
    base = merge_statistics.load_merged(ModelSpec(size.model))
    shape = {"length": size.length, "batch_size": size.batch, "rows": size.rows, "seed": None}
    batches = {
        (text, split): [dict(b) for b in tasks.loader(text, base.tokenizer, split=split, **shape)]
        for text in tasks.TEXTS
        for split in ("validation", "test")
        if text in tasks.TASKS or split == "test"
    }
    return World(size, base, Checkpoint(ModelSpec(size.model)), batches)


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(network: Network, params: PyTree, batch: Batch) -> jax.Array:
    """The logarithm of each target's probability, `[B, T]`."""
    inputs = (batch["tokens"], batch["positions"], batch["segments"])
    h = network.apply({"params": params}, *inputs, method="features")
    logits = network.apply({"params": params}, h, method="logits")
    return jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]


def updates(world: World, adapter: Path) -> Kernels:
    """The dense updates of an adapter by tensor, in float32."""
    source, found = AdapterSource(str(adapter), world.checkpoint), {}
    for path in source.paths:
        factors = source.factors(path)
        assert factors is not None
        delta = factors.a @ factors.b
        found[tensor_name(path, world.checkpoint)] = np.float32(
            delta.T if source.modules[path].weight.transpose else delta
        )
    return found


def add(kernels: Kernels, *terms: tuple[float, Kernels]) -> Kernels:
    """Kernels plus multiples of updates."""
    return {name: x + sum(np.float32(c) * of[name] for c, of in terms) for name, x in kernels.items()}


def merge(world: World, how: Merge, experts: Sequence[Kernels], found: Sequence[Kernels], seed: int) -> Kernels:
    """The kernels that a rule makes of the experts' updates; `found` are the statistics of each expert."""
    rule, base, merged = RULES[how.rule], world.kernels(), {}
    scopes = [dict(how.options)]
    for name, kernel in base.items():
        shared, one = (parameters.resolve(rule, "mergekit", scopes, name, 0.0, per_model=p) for p in (False, True))
        keys = {rule.statistics: name, "output_gram": f"{name}{statistics.OUTPUT_GRAM}"} if rule.statistics else {}
        tensors = [kernel + expert[name] for expert in experts]
        own = [{k: of[n] for k, n in keys.items() if n in of} for of in found] if keys else ()
        merged[name] = rule.merge(Group(name, kernel.copy(), tensors, shared, [one] * len(experts), seed, None, own))
    return merged


def measured(world: World, task: str, adapter: Path, kind: str) -> dict[str, Any]:
    """The statistics of an expert on its own training data, by tensor, kept beside the adapter."""
    path = adapter.with_name(f"{adapter.name}.{kind}.safetensors")
    if not path.exists():
        params = world.with_kernels(add(world.kernels(), (1.0, updates(world, adapter))))
        shape = {"length": world.size.length, "batch_size": world.size.batch, "rows": world.size.statistics_rows}
        rows = tasks.loader(task, world.base.tokenizer, split="train", seed=None, **shape)
        leaves = {tensor.leaf for tensor in world.adapted}
        by_leaf = merge_statistics.measure(world.base, params, rows, kind, chosen=lambda name: name in leaves)
        statistics.write(path, statistics.by_tensor(world.adapted, by_leaf, square=kind == "gram"))
    return load_file(path)
