"""The bytes that a step moves between devices, by formula: what the collectives of its compiled program add up to.

As there, the bytes of one collective are those of the larger of its operand and its result, on each device.
"""

import math

from lowrank import models
from lowrank.core import parameter_summary, sharding
from lowrank.memory import formulas
from lowrank.memory.shapes import StepInputs, device_bytes
from lowrank.training.run import Run

FLOAT32 = 4


def moved_bytes(run: Run, r: StepInputs) -> int:
    """The bytes that a step of `run` moves over the links of each device."""
    return math.ceil(run.optim.accumulate * (_weights(run, r) + _activations(run, r)) + _gradients(run, r))


def _weights(run: Run, r: StepInputs) -> float:
    """The shards that `fsdp` and `context` gather: the layers' in the forward and the backward pass, the head's once.

    The gradient of a head's inputs is computed beside its logits.
    """
    if run.mesh.shape["fsdp"] * run.mesh.shape["context"] == 1:
        return 0.0
    layers, table = formulas.gathered_leaves(run, r)
    return (2 * formulas.total_bytes(run, layers) + formulas.total_bytes(run, table)) / run.mesh.shape["tensor"]


def _activations(run: Run, r: StepInputs) -> float:
    """Of a microbatch: the sums over `tensor` after each sublayer, and the keys and values of other tokens."""
    c, mesh = run.network.config, run.mesh.shape
    tokens = math.prod(r.batch["tokens"].shape) // (sharding.num_token_shards(run.mesh) * run.optim.accumulate)
    passes = 3 if c.remat not in ("none", "dots", "dots_all") else 2  # forward, backward, and forward again
    element = parameter_summary.bits_per_element(c.dtype) / 8
    sums = 2 * passes * tokens * c.width * element if mesh["tensor"] > 1 else 0.0
    keys = 0.0
    if mesh["context"] > 1 and isinstance(c, models.DecoderConfig):
        keys = 2 * passes * tokens * mesh["context"] * c.kv_heads * c.head_dim / min(mesh["tensor"], c.kv_heads)
    return c.layers * (sums + keys * element)


def _gradients(run: Run, r: StepInputs) -> float:
    """The sum of the trained leaves' float32 gradients over the devices that hold other rows or tokens."""
    alone = sharding.num_token_shards(run.mesh) == 1
    return 0.0 if alone else device_bytes(r.state.trained)
