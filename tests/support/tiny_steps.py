"""A compiled step on a residual stack of two matmuls per layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import methods
from lowrank.core import sharding, tree, weight
from lowrank.core.typing import Sums
from lowrank.training import optimizer as optim
from lowrank.training import step
from lowrank.training.optimizer import OptimConfig

L, D, B = 4, 64, 16  # layers, width, batch


LR = np.float32(0.01)


def squared_error(params, batch, rng):
    """A residual stack of two matmuls a layer, weighted squared error."""
    del rng

    def block(x_BxD, layer):
        return x_BxD + jnp.tanh(weight.dot(x_BxD, layer["attn"]["q"]["kernel"])) @ layer["attn"]["o"]["kernel"], None

    out_BxD = jax.lax.scan(block, batch["x"], params["layers"])[0]
    error_B = jnp.sum((out_BxD - batch["y"]) ** 2, -1)
    return Sums(jnp.sum(error_B * batch["weights"]), jnp.sum(batch["weights"]))


def stack_params(width=D, layers=L):
    keys = jax.random.split(jax.random.key(0), 2)
    q, o = (jax.random.normal(k, (layers, width, width)) * 0.3 / width**0.5 for k in keys)
    return {"layers": {"attn": {"q": {"kernel": q}, "o": {"kernel": o}}}}


def stack_batch(mesh, width=D, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(size=B).astype(np.float32)  # uneven: a mean of microbatch means would be wrong
    rows = {"x": rng.normal(size=(B, width)), "y": rng.normal(size=(B, width)), "weights": weights}
    return sharding.make_global_batch({k: v.astype(np.float32) for k, v in rows.items()}, mesh)


@functools.cache
def compiled_step(full=False, sizes=(1, 1, 1), width=D, layers=L, loss=squared_error, **options):
    mesh = sharding.make_mesh(*sizes)
    method = methods.full() if full else methods.lora(rank=4)
    params = methods.attach(method, stack_params(width, layers), jax.random.key(1))
    params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    trained, frozen = tree.split(params, weight.declared_mask(params, method.trainable))
    config = OptimConfig(**options)
    optimizer = optim.build_optimizer(config, 10, trained)
    state, batch = step.init_state(trained, optimizer, mesh, config.paged), stack_batch(mesh, width)
    fn = step.make_step(loss, optimizer, seed=0, accumulate=config.accumulate)
    return step.compile_step(fn, state, frozen, batch), state, frozen, batch, mesh


def build_step(**options):
    """`(compiled step, state, frozen, batch, mesh)`; the state is a copy that may be donated."""
    compiled, state, *rest = compiled_step(**options)
    return compiled, jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state), *rest
