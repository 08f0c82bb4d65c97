"""Memory by formula: bytes on each device, from shapes, shardings and the config alone."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lowrank import models
from lowrank.core import parameter_summary, sharding, tree
from lowrank.core.weight import is_weight
from lowrank.memory import residuals
from lowrank.memory.shapes import StepInputs, device_bytes, step_inputs
from lowrank.training import offload
from lowrank.training.offload import HOST
from lowrank.training.run import Run
from lowrank.weights.quantized import base


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device. Nothing is thought to share room, so the sums are a little above what is needed."""

    weights: int = 0  # the frozen leaves, codes as they are
    adapter: int = 0  # the trained leaves
    moments: int = 0  # the optimizer's state, as far as it is on the device
    batch: int = 0
    gradients: int = 0  # with accumulation, a microbatch's and their sum
    activations: int = 0  # what the backward pass finds saved
    temporary: int = 0  # a block recomputed, logits and their gradient, codes decoded, shards gathered
    kv_cache: int = 0  # of the texts that an evaluation writes
    host: int = 0  # in the host's memory

    @property
    def resident(self) -> int:
        """What stays from step to step."""
        return self.weights + self.adapter + self.moments

    @property
    def working(self) -> int:
        """What a step needs besides: the compiler's temporary bytes."""
        return self.gradients + self.activations + self.temporary

    @property
    def step(self) -> int:
        """A training step."""
        return self.resident + self.batch + self.working

    @property
    def generation(self) -> int:
        """Writing texts between steps: 0 where a run writes none."""
        return self.resident + self.kv_cache if self.kv_cache else 0

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.step, self.generation)


def memory(run: Run, arrays: StepInputs | None = None) -> Memory:
    """What `run` takes on each device."""
    r = arrays or step_inputs(run)
    adapter = device_bytes(r.state.trained)
    return Memory(
        weights=device_bytes(r.frozen),
        adapter=adapter,
        moments=device_bytes(r.state.optimizer),
        batch=device_bytes(r.batch),
        gradients=adapter * (2 if run.optim.accumulate > 1 else 1),
        activations=residuals.activations(run, r),
        temporary=temporary(run, r),
        kv_cache=kv_cache(run),
        host=device_bytes((r.state, r.frozen), HOST) + residuals.activations(run, r, host=True),
    )


def temporary(run: Run, r: StepInputs) -> int:
    """A step's working set: one block's activations in full, logits, decoded tiles, gathered shards of one block.

    To these comes what a paged optimizer brings in at a time.
    """
    block = residuals.activations(run, r, remat="none") // run.network.config.layers
    return block + logits(run, r) + decoded(run) + gathered(run, r) + streamed(run, r)


def streamed(run: Run, r: StepInputs) -> int:
    """The moments of one trained leaf, the largest, that a paged optimizer has on the device at a time."""
    if not run.paged:
        return 0
    owner = jax.tree.leaves(offload.owners(run.optimizer(), r.state.optimizer, r.state.trained))
    of = collections.defaultdict(list)
    for i, x in zip(owner, jax.tree.leaves(r.state.optimizer), strict=True):
        of[i].append(x)
    return max(device_bytes(moments, HOST) for moments in of.values())


def logits(run: Run, r: StepInputs) -> int:
    """The logits of as many tokens as exist at a time and their gradient, float32."""
    if not run.objective.vocabulary_logits:
        return 0
    tokens = math.prod(r.batch["tokens"].shape) // (sharding.num_batch_shards(run.mesh) * run.optim.accumulate)
    some = min(tokens, run.config.logits_chunk_tokens or tokens)
    return 2 * 4 * some * run.network.config.vocab_size // run.mesh.shape["tensor"]


def decoded(run: Run) -> int:
    """The tile of a quantised kernel that is decoded at a time, float32: the largest."""
    forms = [w for _, w in _forms(run.shapes)]
    return 4 * max((min(base.TILE_ELEMENTS, math.prod(w.shape[-2:])) for w in forms), default=0)


def gathered(run: Run, r: StepInputs) -> int:
    """The other devices' shards of one block's leaves, and of the logits', which `fsdp` brings together for a turn."""
    if run.mesh.shape["fsdp"] == 1:
        return 0
    named = [pair for part in (r.state.trained, r.frozen) for pair in tree.named_leaves(part)]
    read = "embed/embedding" if getattr(run.network.config, "tied", False) else "head/kernel"
    table = [x for name, x in named if name.startswith(read) and run.objective.vocabulary_logits]
    layers = [x for name, x in named if _in_layers(name)]
    whole = _whole(layers) / run.network.config.layers + _whole(table)
    shards = device_bytes(layers) / run.network.config.layers + device_bytes(table)
    return math.ceil(whole / run.mesh.shape["tensor"] - shards)


def _whole(leaves: Sequence[Any]) -> float:
    return sum(x.size * parameter_summary.bits_per_element(x.dtype) / 8 for x in leaves)


def kv_cache(run: Run) -> int:
    """Keys and values of the largest batch of texts, on one device: 2 * layers * rows * slots * heads * width."""
    c = run.network.config
    if run.scorer is None or not run.scorer.prompts or not isinstance(c, models.DecoderConfig):
        return 0
    batch, length = run.scorer.largest
    slots = length + run.scorer.config.max_new + c.num_virtual_tokens
    return 2 * c.layers * batch * slots * c.kv_heads * c.head_dim * parameter_summary.bits_per_element(c.dtype) // 8


def _forms(shapes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The quantised kernels at any depth."""
    found, left = [], tree.named_leaves(shapes, is_weight)
    while left:
        name, w = left.pop()
        if isinstance(w, base.Quantized):
            found.append((name, w))
        elif is_weight(w):
            left += [(name, part) for part in vars(w).values() if is_weight(part)]
    return found


def _in_layers(name: str) -> bool:
    return name.split("/")[0] in tree.STACKS
