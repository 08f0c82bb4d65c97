"""ReLoRA as a method: LoRA that is merged and restarted, so that its updates add up to a higher rank."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank.core import config_schema, tree, weight
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.lora import lora
from lowrank.methods.method import EveryNSteps, Method
from lowrank.methods.options import with_options_of
from lowrank.weights import lora as form
from lowrank.weights.lora import LoRA


@with_options_of(lora)
def relora(every: float = 0.25, warmup: float = 0.1, prune: float = 0.99, **kwargs: Any) -> Method:
    """ReLoRA: LoRA that is merged into the base and restarted every `every` steps (Lialin et al., arXiv:2307.05695).

    Takes the options of `lora`. A restart sets `W <- W + scale A B`, draws A and B as at the start, and sets the share
    `prune` of the entries of their moments, those with the smallest magnitudes, to 0. The learning rate then rises from
    0 to its schedule over `warmup` steps. Values of `every` below 1 are a share of the run, and values of `warmup`
    below 1 are a share of `every`. The base changes, so it must be a plain kernel, and an adapter saves it.

    Differs from the paper: the schedule goes on during the warmup, where the authors' code holds it. An entry keeps its
    moments only if all of them are among the largest, where the code prunes each on its own: Adam would divide a first
    moment by a second one of 0, as A has no gradient while B is 0.
    """
    targets.check_positive(every=every, warmup=warmup, prune=prune)
    if prune > 1:
        raise UserError(f"method.prune {prune} is above 1, the share that resets the moments whole: lower it")
    method = config_schema.call_with_group(lora, kwargs, "method")
    [(target, adapt)] = method.rules

    def on_kernel(key: jax.Array, w: Any, name: str) -> LoRA:
        form.require_plain_kernel("ReLoRA", w)
        return adapt(key, w, name)

    def again(params: PyTree, key: jax.Array) -> PyTree:
        def anew(name: str, w: Any) -> Any:
            if not isinstance(w, LoRA):
                return w
            made = adapt(weight.name_key(key, name), w.materialize(), name)
            return dataclasses.replace(made, scale=w.scale)  # the same array, so that checkpoints do not save it

        return tree.map_named(anew, params, is_leaf=weight.is_weight)

    restarts = EveryNSteps(every, again)

    def lengths(steps: int) -> tuple[int, int]:
        """`(steps between two restarts, steps of warmup)` in a run of `steps`."""
        between = restarts.interval(steps)
        return between, max(1, targets.count_steps(warmup, between))

    def optimizer(plain: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        between, rise = lengths(steps)
        if between >= steps:
            run = f"the run's {plural(steps, 'step')}"
            raise UserError(f"method.every {every} is not less than {run}: it would never restart")
        if rise > between:
            raise UserError(f"method.warmup {warmup} is longer than method.every {every}: lower it")
        return prune_moments(plain, between, prune)

    hooks = dataclasses.replace(
        method.hooks,
        every_n_steps=restarts,
        optimizer=optimizer,
        learning_rates=lambda rates: with_warm_restarts(rates, *lengths(len(rates))),
    )
    return dataclasses.replace(method, rules=((target, on_kernel),), hooks=hooks)


def with_warm_restarts(rates: np.ndarray, every: int, warmup: int) -> np.ndarray:
    """The learning rates `[steps]`, of which those after each restart rise from `1 / warmup` of their size."""
    step = np.arange(len(rates))
    rise = np.minimum(1.0, (step % every + 1) / warmup)
    return np.where(step < every, rates, rates * rise).astype(rates.dtype)


class PruningState(NamedTuple):
    """The state of the optimizer, and the number of updates done."""

    inner: Any
    count: jax.Array  # type: ignore[assignment]  # the updates done; the name hides tuple.count


def prune_moments(
    plain: optax.GradientTransformation, every: int, share: float
) -> optax.GradientTransformationExtraArgs:
    """`plain`, whose moments of LoRA's factors are pruned before updates `every`, `2 every`, ... (from 0).

    In each moment of one matrix, the `share` of the entries with the smallest magnitudes is pruned. An entry that is
    pruned in one moment becomes 0 in all of them.
    """

    def init(trained: PyTree) -> PruningState:
        return PruningState(plain.init(trained), jnp.int32(0))

    def update(gradient: PyTree, state: PruningState, trained: PyTree, **extra: Any) -> tuple[PyTree, PruningState]:
        due = (state.count > 0) & (state.count % every == 0)
        inner = jax.lax.cond(due, lambda s: _pruned(plain, s, trained, share), lambda s: s, state.inner)
        updates, inner = plain.update(gradient, inner, trained, **extra)
        return updates, PruningState(inner, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _pruned(plain: optax.GradientTransformation, state: PyTree, trained: PyTree, share: float) -> PyTree:
    """The `state` of `plain` after pruning."""
    leaves, structure = jax.tree.flatten(trained)
    axes, places = _stack_axes(trained), jax.tree.unflatten(structure, range(len(leaves)))
    kept: dict[int, jax.Array] = {}  # by the place of the leaf: the entries that are large in all moments

    def collect(moment: Any, stack_axes: int, place: int) -> Any:
        if not _masked(moment) and stack_axes >= 0:
            kept[place] = kept.get(place, True) & _largest(moment, share, stack_axes)
        return moment

    def prune(moment: Any, stack_axes: int, place: int) -> Any:
        return jnp.where(kept[place], moment, 0) if place in kept and not _masked(moment) else moment

    for fn in (collect, prune):
        state = optax.tree.map_params(plain, fn, state, axes, places, is_leaf=_masked)
    return state


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _stack_axes(trained: PyTree) -> PyTree:
    """The number of axes before those of a matrix in each factor of a LoRA, and -1 in place of all other leaves."""

    def count(w: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim - 2 if isinstance(w, LoRA) else -1, w)

    return jax.tree.map(count, trained, is_leaf=weight.is_weight)


def _largest(x: jax.Array, share: float, stack_axes: int) -> jax.Array:
    """Bools: the entries of each matrix that are not among the `share` with the smallest magnitudes."""
    size = jnp.abs(x)
    return size > jnp.quantile(size, share, axis=tuple(range(stack_axes, x.ndim)), keepdims=True)
