"""What autodiff keeps from the forward pass for the backward pass: counted on the traced loss, before any compiler."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lowrank import models
from lowrank.core import parameter_summary, sharding, tree
from lowrank.memory.shapes import StepInputs, rows
from lowrank.training.run import Run


def activations(run: Run, inputs: StepInputs, remat: str = "", host: bool = False) -> int:
    """Bytes each device keeps of one microbatch beside the parameters and the batch; `remat` as if it were set so.

    `host`: what it keeps in the host's memory instead.
    The mesh cuts the rows by `data` and `fsdp`. By `tensor` it cuts what has the hidden width or heads apart; what
    cannot be told from the residual stream counts whole.
    """
    now = run.network.config
    config = dataclasses.replace(now, remat=remat or now.remat, remat_names=() if remat else now.remat_names)
    size = next(iter(inputs.batch.values())).shape[0] // (sharding.num_batch_shards(run.mesh) * run.optim.accumulate)
    alone = dataclasses.replace(run, network=models.build_model(config), mesh=sharding.make_mesh(1, 1, 1))
    cut = run.mesh.shape["tensor"]
    found = [x for x in _remembered(alone, inputs, size) if (x.memory_space == jax.memory.Space.Host) == host]
    return math.ceil(sum(_bytes(x) / (cut if _splits(x.shape, config, cut) else 1) for x in found))


_FOUND: dict[Any, list[Any]] = {}  # tracing takes a second, and advice asks for like runs again and again


def _remembered(run: Run, inputs: StepInputs, size: int) -> list[Any]:
    leaves = tree.named_leaves((inputs.state.trained, inputs.frozen, rows(inputs.batch, size)))
    shapes = tuple((name, x.shape, str(x.dtype)) for name, x in leaves)
    key = (
        run.network.config,
        repr(run.config.method),
        repr(run.config.objective),
        run.config.logits_chunk_tokens,
        shapes,
    )
    if key not in _FOUND:
        _FOUND[key] = _residuals(run, inputs, size)
    return _FOUND[key]


def _residuals(run: Run, inputs: StepInputs, size: int) -> list[Any]:
    def kept(trained: Any, frozen: Any, batch: Any) -> Any:
        factors = dict.fromkeys(run.loss_factors, jnp.float32(1))
        loss = lambda t: run.loss(tree.join(t, frozen), batch, jax.random.key(0), **factors).total  # noqa: E731
        return jax.vjp(loss, trained)[1]

    program = jax.make_jaxpr(kept)(inputs.state.trained, inputs.frozen, rows(inputs.batch, size)).jaxpr
    given = {id(v) for v in (*program.invars, *program.constvars)}
    found = {id(v): v.aval for v in program.outvars if id(v) not in given and not hasattr(v, "val")}
    return list(found.values())


def _bytes(x: Any) -> float:
    return math.prod(x.shape) * parameter_summary.bits_per_element(x.dtype) / 8


def _splits(shape: tuple[int, ...], config: Any, cut: int) -> bool:
    """Whether an array of one device's rows is cut by `tensor`: hidden values, or heads apart."""
    hidden = {config.hidden, getattr(config, "expert_hidden", 0)} - {0, config.width}
    if shape and shape[-1] in hidden:
        return shape[-1] % cut == 0
    heads, key_heads = config.heads, getattr(config, "kv_heads", config.heads)
    apart = len(shape) >= 5 or (shape and shape[-1] == config.width // heads)
    return bool(apart) and key_heads % cut == 0 and (heads in shape[1:] or key_heads in shape[1:])
