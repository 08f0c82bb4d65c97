"""One training step: the gradient with respect to the trained leaves alone, and the optimizer's update of them.

The frozen leaves are an argument of the loss that is never differentiated, so neither a gradient, nor a moment, nor a
donated copy of them exists.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lowrank.core import sharding, tree
from lowrank.core.typing import Arrays, Batch, PyTree, Sums
from lowrank.training import offload, random_streams

Prepare = Callable[[PyTree, PyTree, Batch], Batch]  # (params, params at the start or None, batch) -> batch
Loss = Callable[..., Sums]  # (params, batch, rng, **factors) -> sums
Differentiated = tuple[PyTree, Arrays]  # (trained leaves, factors of the loss by name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The values that a step changes: the number of steps done, the trained leaves, the optimizer's state."""

    step: jax.Array  # int32 scalar
    trained: PyTree  # None in the place of a frozen leaf
    optimizer: PyTree
    reference: PyTree = None  # the trained leaves at the start of the run, where the loss compares with a copy of them


def init_state(
    trained: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh, paged: bool = False, copied: bool = False
) -> State:
    """The state before the first step, for trained leaves that have their shardings; the moments follow them.

    With `paged`, the moments lie in the host's memory, and each step streams them to the device for the update. With
    `copied`, the state keeps a copy of the trained leaves as they are now.
    """
    where = moment_shapes(trained, optimizer, mesh, paged)
    moments = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, where))(trained)
    reference = jax.tree.map(jnp.copy, trained) if copied else None  # of its own, as the trained leaves are donated
    return State(jax.device_put(jnp.int32(0), sharding.replicated_sharding(mesh)), trained, moments, reference)


def moment_shapes(trained: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh, paged: bool = False) -> PyTree:
    """The optimizer's state as shapes with shardings, for trained leaves (arrays or shapes) that have shardings."""
    shapes = jax.eval_shape(optimizer.init, trained)
    where = sharding.optimizer_shardings(optimizer, shapes, trained, mesh)
    if paged:
        where = offload.offload_shardings(where, offload.owners(optimizer, shapes, trained))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulate: int = 1,
    factors: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType({}),
    prepare: Prepare | None = None,
) -> Callable[[State, PyTree, Mapping[str, jax.Array], jax.Array], tuple[State, dict[str, jax.Array]]]:
    """`step(state, frozen, batch, lr) -> (state, metrics)`, which `compile_step` compiles.

    `loss(params, batch, rng)` returns a sum and its weight. The gradient is that of sum / weight over the whole batch,
    for any number of microbatches. The metrics are loss, grad_norm (before the clip), lr, weight, and the means of the
    loss's named sums. `prepare` adds to a batch what the loss takes from all of its rows, without a gradient.

    `factors` names further arguments of the loss, and their values at a step: factors of terms that add to the gradient
    and not to the sum. The metric of such a name is the value of these terms, the derivative of sum / weight with
    respect to the factor. An optimizer that takes extra arguments receives `lr` and `gradient_at`, a function that
    returns the batch's gradient at other trained leaves.
    """

    def step(
        state: State, frozen: PyTree, batch: Mapping[str, jax.Array], lr: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        rng = random_streams.step_key(seed, state.step)
        if prepare:
            start = None if state.reference is None else tree.join(state.reference, frozen)
            batch = prepare(tree.join(state.trained, frozen), start, batch)
        values = {name: at_step(state.step) for name, at_step in factors.items()}
        gradient_at = functools.partial(_mean_gradient, loss, frozen, batch, rng, accumulate, values)
        sums, (gradient, terms) = gradient_at(state.trained)

        def update(gradient: PyTree, moments: PyTree, trained: PyTree) -> tuple[PyTree, PyTree]:
            extra = {"lr": lr, "gradient_at": lambda trained: gradient_at(trained)[1][0]}
            updates, moments = optax.with_extra_args_support(optimizer).update(gradient, moments, trained, **extra)
            return optax.apply_updates(trained, updates), moments

        trained, moments = offload.stream_state(update, optimizer, gradient, state.optimizer, state.trained)
        metrics = {
            "loss": _mean(sums.total, sums.weight),
            "grad_norm": optax.tree.norm(gradient),
            "lr": lr,
            "weight": sums.weight,
            **{name: _mean(*named) for name, named in sums.metrics.items()},
            **terms,
        }
        return State(state.step + 1, trained, moments, state.reference), metrics

    return step


def compile_step(step: Callable, state: State, frozen: PyTree, batch: Mapping[str, Any]) -> jax.stages.Compiled:
    """`step` compiled ahead of time for these arrays, with the state donated and its shardings kept.

    The program is never compiled again: a batch of another shape raises an error. It takes any float32 scalar as its
    learning rate.
    """
    where = jax.tree.map(lambda x: x.sharding, state)
    program = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    lr = jax.ShapeDtypeStruct((), jnp.float32, sharding=where.step)
    with sharding.mesh_context(state):
        return program.lower(state, frozen, batch, lr).compile()


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total / jnp.maximum(weight, 1e-8)


def _mean_gradient(
    loss: Loss, frozen: PyTree, batch: Batch, rng: jax.Array, accumulate: int, factors: Arrays, trained: PyTree
) -> tuple[Sums, Differentiated]:
    """`(sums, gradient of sum / weight)` of the loss over the whole batch."""

    def sums_of(leaves: Differentiated, part: Batch, index: jax.Array) -> tuple[jax.Array, Sums]:
        sums = loss(tree.join(leaves[0], frozen), part, jax.random.fold_in(rng, index), **leaves[1])
        return sums.total, sums

    (_, sums), gradient = _accumulated(sums_of, (trained, factors), batch, accumulate)
    return sums, jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1e-8), gradient)


def _accumulated(sums_of: Callable, trained: PyTree, batch: Batch, n: int) -> tuple[Any, PyTree]:
    """`((total, sums), gradient of the total)` over `n` microbatches, added up in float32."""
    gradient = jax.value_and_grad(sums_of, has_aux=True)
    if n == 1:
        return gradient(trained, batch, jnp.int32(0))

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        value = gradient(trained, *part)
        return jax.tree.map(lambda c, v: c + v.astype(c.dtype), carry, value), None

    parts = _microbatches(batch, n)
    shapes = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], parts), jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, (parts, jnp.arange(n)))[0]


def _microbatches(batch: Batch, n: int) -> PyTree:
    """The arrays `[n, B / n, ...]` of `n` microbatches.

    Microbatch i takes the rows i, i + n, ..., so each device keeps its rows; a row of several sequences is whole.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0), dict(batch))


def map_microbatches(function: Callable[[Batch], jax.Array], batch: Batch, n: int) -> jax.Array:
    """`function`, which gives one value or several for each row, of `n` microbatches after each other: `[B, ...]`."""
    if n == 1:
        return function(batch)
    values = jax.lax.map(function, _microbatches(batch, n))
    return jnp.moveaxis(values, 0, 1).reshape(-1, *values.shape[2:])
