"""The residuals that autodiff saves from the forward pass for the backward pass, counted on the traced loss."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank import models
from lowrank.core import parameter_summary, sharding, tree
from lowrank.memory.shapes import StepInputs, device_bytes, head_table, with_rows
from lowrank.training.run import Run


def activation_bytes(run: Run, inputs: StepInputs, remat: str = "", host: bool = False) -> int:
    """The bytes on each device of one microbatch's residuals, without the parameters and the batch.

    A given `remat` replaces that of the run. With `host`, the residuals in the host's memory are counted instead. The
    mesh shards rows over `data` and `fsdp`, and the tokens of each row over `context`. Over `tensor` it shards arrays
    with the hidden width or with a heads axis; arrays that cannot be told from the residual stream count in full. The
    gradient of a trained head, which a chunked loss computes in the forward pass, lies as the head does.
    """
    now = run.network.config
    config = dataclasses.replace(now, remat=remat or now.remat, remat_names=() if remat else now.remat_names)
    size = next(iter(inputs.batch.values())).shape[0] // (sharding.num_batch_shards(run.mesh) * run.optim.accumulate)
    alone = dataclasses.replace(run, network=models.build_model(config), mesh=sharding.make_mesh(1, 1, 1))
    cut, parts = run.mesh.shape["tensor"], run.mesh.shape["context"]
    residuals = [x for x in _cached_residuals(alone, inputs, size) if (x.memory_space == jax.memory.Space.Host) == host]
    heads = {x.shape: x for name, x in tree.named_leaves(inputs.state.trained) if name.startswith(head_table(run))}
    gradients = device_bytes([heads[x.shape] for x in residuals if x.shape in heads])
    others = [x for x in residuals if x.shape not in heads]
    shared = sum(_bytes(x) / (cut if _is_sharded(x.shape, config, cut) else 1) for x in others) / parts
    return math.ceil(shared) + gradients


_CACHE: dict[Any, list[Any]] = {}  # a trace takes a second, and advice asks for similar runs many times


def _cached_residuals(run: Run, inputs: StepInputs, size: int) -> list[Any]:
    leaves = tree.named_leaves((inputs.state.trained, inputs.frozen, with_rows(inputs.batch, size)))
    shapes = tuple((name, x.shape, str(x.dtype)) for name, x in leaves)
    key = (
        run.network.config,
        repr(run.config.method),
        repr(run.config.objective),
        run.config.logits_chunk_tokens,
        shapes,
    )
    if key not in _CACHE:
        _CACHE[key] = _residuals(run, inputs, size)
    return _CACHE[key]


def _residuals(run: Run, inputs: StepInputs, size: int) -> list[Any]:
    def pullback(trained: Any, frozen: Any, batch: Any) -> Any:
        factors = dict.fromkeys(run.loss_factors, jnp.float32(1))
        loss = lambda t: run.loss(tree.join(t, frozen), batch, jax.random.key(0), **factors).total  # noqa: E731
        return jax.vjp(loss, trained)[1]

    program = jax.make_jaxpr(pullback)(inputs.state.trained, inputs.frozen, with_rows(inputs.batch, size)).jaxpr
    inputs_of_program = {id(v) for v in (*program.invars, *program.constvars)}
    avals = {id(v): v.aval for v in program.outvars if id(v) not in inputs_of_program and not hasattr(v, "val")}
    return list(avals.values())


def _bytes(x: Any) -> float:
    return math.prod(x.shape) * parameter_summary.bits_per_element(x.dtype) / 8


def _is_sharded(shape: tuple[int, ...], config: Any, cut: int) -> bool:
    """Whether `tensor` shards an array of one device's rows: hidden values, or an array with a heads axis."""
    fused = 2 * config.hidden if config.fused_gate_up else 0
    hidden = {config.hidden, fused, getattr(config, "expert_hidden", 0)} - {0, config.width}
    if shape and shape[-1] in hidden:
        return shape[-1] % cut == 0
    heads, key_heads = config.heads, getattr(config, "kv_heads", config.heads)
    apart = len(shape) >= 5 or (shape and shape[-1] == config.width // heads)
    return bool(apart) and key_heads % cut == 0 and (heads in shape[1:] or key_heads in shape[1:])
