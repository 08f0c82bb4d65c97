"""The memory of a run by formula: bytes on each device, computed from shapes, shardings and the config alone."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from lowrank import models
from lowrank.core import parameter_summary, sharding, tree
from lowrank.core.weight import is_weight
from lowrank.memory import residuals
from lowrank.memory.shapes import StepInputs, device_bytes, head_table, logits_chunks, step_inputs
from lowrank.training import offload, texts
from lowrank.training.offload import HOST
from lowrank.training.run import Run
from lowrank.weights.quantized import base


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device. No two parts share memory in the formulas, so the sums are a little too large."""

    weights: int = 0  # the frozen leaves, quantized leaves as codes
    adapter: int = 0  # the trained leaves
    moments: int = 0  # the part of the optimizer's state that lies on the device
    batch: int = 0
    gradients: int = 0  # with accumulation, those of a microbatch and their sum
    activations: int = 0  # the residuals of the backward pass
    temporary: int = 0  # a recomputed block, logits and their gradient, decoded codes, gathered shards
    kv_cache: int = 0  # of the texts that a step or an evaluation generates
    host: int = 0  # in the host's memory

    @property
    def resident(self) -> int:
        """The arrays that stay from step to step."""
        return self.weights + self.adapter + self.moments

    @property
    def working(self) -> int:
        """The arrays that exist during a step alone, which are the compiler's temporary bytes."""
        return self.gradients + self.activations + self.temporary

    @property
    def step(self) -> int:
        """The memory of a training step."""
        return self.resident + self.batch + self.working

    @property
    def generation(self) -> int:
        """The memory of the generation of texts between steps; 0 for a run that generates none."""
        return self.resident + self.kv_cache if self.kv_cache else 0

    @property
    def peak(self) -> int:
        """The memory of the step or of generation, whichever is larger."""
        return max(self.step, self.generation)


def estimate_memory(run: Run, inputs: StepInputs | None = None) -> Memory:
    """The memory that `run` takes on each device, for the given arrays of a step or else those of the run."""
    r = inputs or step_inputs(run)
    adapter = device_bytes(r.state.trained)
    return Memory(
        weights=device_bytes(r.frozen),
        adapter=adapter,
        moments=device_bytes(r.state.optimizer),
        batch=device_bytes(r.batch),
        gradients=adapter * (2 if run.optim.accumulate > 1 else 1),
        activations=residuals.activation_bytes(run, r),
        temporary=temporary_bytes(run, r),
        kv_cache=kv_cache_bytes(run),
        host=device_bytes((r.state, r.frozen), HOST) + residuals.activation_bytes(run, r, host=True),
    )


def temporary_bytes(run: Run, r: StepInputs) -> int:
    """One block in full with the keys and shards that it gathers, logits, decoded tiles and streamed moments."""
    block = residuals.activation_bytes(run, r, remat="none") // run.network.config.layers + gathered_keys_bytes(run, r)
    return block + logits_bytes(run, r) + decoded_bytes(run) + gathered_bytes(run, r) + streamed_bytes(run, r)


def streamed_bytes(run: Run, r: StepInputs) -> int:
    """The moments of the largest trained leaf, as a paged optimizer streams those of one leaf at a time."""
    if not run.paged:
        return 0
    owner = jax.tree.leaves(offload.owners(run.optimizer(), r.state.optimizer, r.state.trained))
    moments_of = collections.defaultdict(list)
    for i, x in zip(owner, jax.tree.leaves(r.state.optimizer), strict=True):
        moments_of[i].append(x)
    return max(device_bytes(moments, HOST) for moments in moments_of.values())


def logits_bytes(run: Run, r: StepInputs) -> int:
    """The float32 logits that exist at a time, whose place a chunk's gradient takes; without chunks, both exist."""
    _, tokens = logits_chunks(run, r)
    copies = 1 if run.config.logits_chunk_tokens else 2
    return copies * 4 * tokens * run.network.config.vocab_size // run.mesh.shape["tensor"]


def decoded_bytes(run: Run) -> int:
    """The largest float32 tile of a quantized kernel that is decoded at a time on the devices of the mesh."""
    mesh = run.mesh
    platform = "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform  # an abstract mesh has none
    tile = base.tile_elements(platform)
    return 4 * max((min(tile, math.prod(w.shape[-2:])) for _, w in _forms(run.shapes)), default=0)


def gathered_bytes(run: Run, r: StepInputs) -> int:
    """The other devices' shards of one block's leaves and of the head's kernel, which are gathered for their use.

    The gradient of a block's trained leaves is whole on each device too, before it is summed over them and cut.
    """
    if run.mesh.shape["fsdp"] * run.mesh.shape["context"] == 1:
        return 0
    layers, table = gathered_leaves(run, r)
    layers += [x for name, x in tree.named_leaves(r.state.trained) if _in_layers(name)]
    total = total_bytes(run, layers) / run.network.config.layers + total_bytes(run, table)
    shards = shard_bytes(run, layers) / run.network.config.layers + shard_bytes(run, table)
    return math.ceil(total / run.mesh.shape["tensor"] - shards)


def gathered_keys_bytes(run: Run, r: StepInputs) -> int:
    """The keys and values of other devices' tokens, where `context` shares the tokens of a row.

    They exist as they arrive, with the heads in front as kernels take them, and as their gradients.
    """
    c, parts = run.network.config, run.mesh.shape["context"]
    if parts == 1 or not isinstance(c, models.DecoderConfig):
        return 0
    tokens = math.prod(r.batch["tokens"].shape) // (sharding.num_batch_shards(run.mesh) * run.optim.accumulate)
    width = c.kv_heads * c.head_dim // math.gcd(c.kv_heads, run.mesh.shape["tensor"])
    return 3 * 2 * (tokens - tokens // parts) * width * parameter_summary.bits_per_element(c.dtype) // 8


def gathered_leaves(run: Run, r: StepInputs) -> tuple[list[Any], list[Any]]:
    """`(layers, table)`: the leaves of all layers, and those of the head's kernel, which products read."""
    named = [pair for part in (r.state.trained, r.frozen) for pair in tree.named_leaves(part)]
    table = [x for name, x in named if name.startswith(head_table(run)) and run.objective.vocabulary_logits]
    return [x for name, x in named if _in_layers(name)], table


def total_bytes(run: Run, leaves: Sequence[Any]) -> float:
    """The bytes of all shards of arrays together, as they move between devices."""
    return sum(x.size * _moved_bits(run, x) / 8 for x in leaves)


def shard_bytes(run: Run, leaves: Sequence[Any]) -> float:
    """The bytes of one device's shards of arrays, as they move between devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * _moved_bits(run, x) / 8 for x in leaves)


def _moved_bits(run: Run, x: Any) -> int:
    """The bits of an element where it is used: what is wider than the activations is cast before it moves."""
    return min(parameter_summary.bits_per_element(dtype) for dtype in (x.dtype, run.network.config.dtype))


def kv_cache_bytes(run: Run) -> int:
    """The keys and values of all texts that are written at a time, as `models.init_cache` stores them."""
    c = run.network.config
    if not isinstance(c, models.DecoderConfig):
        return 0
    written = [run.scorer.text_sizes] if run.scorer and run.scorer.prompts else []
    written += [texts.text_sizes(run)] if run.objective.rollout else []
    shapes = [(c.layers, sizes.rows, c.kv_heads, sizes.slots, c.head_dim) for sizes in written]
    shards = [NamedSharding(run.mesh, sharding.slots_spec(shape, run.mesh)).shard_shape(shape) for shape in shapes]
    return max((2 * math.prod(s) * parameter_summary.bits_per_element(c.dtype) // 8 for s in shards), default=0)


def _forms(shapes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The quantized kernels at any depth of forms."""
    quantized, pending = [], tree.named_leaves(shapes, is_weight)
    while pending:
        name, w = pending.pop()
        if isinstance(w, base.Quantized):
            quantized.append((name, w))
        elif is_weight(w):
            pending += [(name, part) for part in vars(w).values() if is_weight(part)]
    return quantized


def _in_layers(name: str) -> bool:
    return name.split("/")[0] in tree.STACKS
