"""BiDoRA as a method: DoRA whose magnitudes are trained on a validation split, and whose directions on the rest."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank.core import config_schema, tree, weight
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.dora import dora
from lowrank.methods.method import Holdout, Method
from lowrank.methods.options import with_options_of
from lowrank.methods.regularizers import penalty_regularizer
from lowrank.weights.dora import DoRA

MAGNITUDE = r"(.*/)?magnitude"


@with_options_of(dora)
def bidora(holdout: float = 0.2, retrain: float = 0.5, orthogonal: float = 0.001, **kwargs: Any) -> Method:
    """BiDoRA: DoRA, optimized at two levels (Qin et al. 2024, arXiv:2410.09758). Takes the options of `dora`.

    A share `holdout` of the training records is the validation split of the upper level. Steps 1, 3, ... (from 0) take
    the gradient of the validation loss and update nothing. The step after each of them uses a batch of the other
    records. It updates the directions V, and all other trained leaves but the magnitudes, by the training loss. It
    updates the magnitudes m by the gradient of the validation loss one step of V ahead,
    `dL_val/dm - xi d2L_train/dm dV . dL_val/dV`, where xi is the learning rate. The product with the second derivative
    is the difference of two gradients of that batch, at V +- 0.01 dL_val/dV / ||dL_val/dV|| (Liu et al. 2019,
    arXiv:1806.09055, equation 8). For the last share `retrain` of the steps, the magnitudes are constant, and all other
    trained leaves are trained on all records, from their initial values and with new moments: they keep nothing of
    the steps before, so that the share is not small. `orthogonal` is the factor of the regularizer of the training
    loss, the mean over all adapted kernels of `||D^T D - I||`, where D is the direction with unit columns.

    Differs from the paper: one learning rate, one schedule and one optimizer setting serve both levels and the
    retraining, where the authors' code (t2ance/BiDoRA) has its own for each.
    """
    targets.check_positive(holdout=holdout)
    targets.check_fraction(holdout=holdout, retrain=retrain)
    if orthogonal:
        targets.check_positive(orthogonal=orthogonal)
    method = config_schema.call_with_group(dora, kwargs, "method")
    split = Holdout(holdout, rest=retrain)
    return dataclasses.replace(
        method,
        hooks=dataclasses.replace(
            method.hooks,
            holdout=split,
            regularizer=penalty_regularizer(_mean_distance, orthogonal),
            regularizer_scale=lambda step, steps: jnp.float32(1) - looks_ahead(step, split.batches(steps)),
            optimizer=lambda plain, steps: bilevel(plain, MAGNITUDE, split.batches(steps), steps),
        ),
    )


def _mean_distance(params: PyTree) -> jax.Array:
    weights = [w for w in jax.tree.leaves(params, is_leaf=weight.is_weight) if isinstance(w, DoRA)]
    return jnp.mean(jnp.concatenate([_distances(w) for w in weights]))


def _distances(w: DoRA) -> jax.Array:
    """One distance per kernel of a stack, computed one kernel at a time: each needs some copies of it."""
    if len(w.shape) > 2:
        return jax.lax.map(_distances, w).reshape(-1)
    return jax.checkpoint(_distance)(w)[None]


def _distance(w: DoRA) -> jax.Array:
    """`||D^T D - I||` (Frobenius) of one kernel, from the smaller of `D^T D` and `D D^T`, whose norms are the same.

    Columns have unit length, so `||D^T D - I||^2 = ||D^T D||^2 - out`.
    """
    direction = weight.at_least_float32(weight.materialize(w.base)) + w.delta()
    d = direction / jnp.linalg.norm(direction, axis=0, keepdims=True)
    n_in, n_out = d.shape
    gram = d.T @ d if n_out <= n_in else d @ d.T
    square = jnp.sum(jnp.square(gram)) - n_out
    return jnp.sqrt(jnp.maximum(square, 1e-12))


class BilevelState(NamedTuple):
    """A whole optimizer state per group, so that the moments of each group come from its own gradients."""

    lower: Any
    upper: Any
    count: jax.Array  # type: ignore[assignment]  # the updates done; the name hides tuple.count
    held: PyTree  # the last validation gradient
    initial: PyTree  # the trained leaves before the first update


def looks_ahead(step: jax.Array, until: int) -> jax.Array:
    """Whether `step` (from 0) only takes the gradient of a validation batch."""
    return (step % 2 == 1) & (step < until)


def bilevel(
    plain: optax.GradientTransformation, upper: str, until: int, steps: int
) -> optax.GradientTransformationExtraArgs:
    """`plain`, which updates the leaves that `upper` matches by their hypergradient, and all others by their gradient.

    Updates 1, 3, ... (from 0) below `until` only record the gradient of a validation batch; the update after each of
    them changes both groups. The moments of a group that is not updated stay as they are. If the odd `until` is before
    `steps`, the other leaves and their moments return to their initial values before update `until`.
    """

    def of(group: bool, leaves: PyTree) -> PyTree:
        """The leaves of the upper group, or of the other group, with zeros in place of all other leaves."""
        return tree.map_named(
            lambda name, x: x if bool(re.fullmatch(upper, name)) == group else jnp.zeros_like(x), leaves
        )

    def init(trained: PyTree) -> BilevelState:
        zeros, initial = (jax.tree.map(make, trained) for make in (jnp.zeros_like, jnp.copy))
        return BilevelState(plain.init(trained), plain.init(trained), jnp.int32(0), zeros, initial)

    def update(
        gradient: PyTree,
        state: BilevelState,
        trained: PyTree,
        *,
        lr: jax.Array,
        gradient_at: Callable[[PyTree], PyTree],
        **_: Any,
    ) -> tuple[PyTree, BilevelState]:
        t = state.count
        looks, restarts = looks_ahead(t, until), (t == until - 1) & (until < steps)
        moves = (t % 2 == 0) & (t > 0) & (t < until)  # the upper group, by the gradient that was recorded
        mixed = functools.partial(_mixed, gradient_at, trained, of(False, state.held))
        ahead = jax.lax.cond(moves, mixed, lambda: jax.tree.map(jnp.zeros_like, trained))
        hyper = jax.tree.map(lambda g, m: g - lr * m, state.held, ahead)
        below, lower = plain.update(of(False, gradient), state.lower, trained, lr=lr)
        above, higher = plain.update(of(True, hyper), state.upper, trained, lr=lr)
        back = optax.tree.sub(state.initial, trained)
        below = optax.tree.where(restarts, back, optax.tree.scale(1.0 - looks, below))
        updates = optax.tree.add(of(False, below), optax.tree.scale(1.0 * moves, of(True, above)))
        lower = optax.tree.where(looks, state.lower, lower)
        return updates, BilevelState(
            optax.tree.where(restarts, plain.init(trained), lower),
            optax.tree.where(moves, higher, state.upper),
            t + 1,
            optax.tree.where(looks, gradient, state.held),
            state.initial,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _mixed(gradient_at: Callable[[PyTree], PyTree], trained: PyTree, direction: PyTree) -> PyTree:
    """The derivative of the gradient in `direction`, as the difference of two gradients."""
    step = 0.01 / jnp.maximum(optax.tree.norm(direction), 1e-12)
    sides = jnp.array([step, -step])
    gradients = jax.lax.map(lambda side: gradient_at(optax.tree.add_scale(trained, side, direction)), sides)
    return jax.tree.map(lambda g: (g[0] - g[1]) / (2 * step), gradients)
