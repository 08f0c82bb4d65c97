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
from lowrank.methods.method import Method
from lowrank.methods.options import with_options_of
from lowrank.methods.regularizers import penalty_regularizer
from lowrank.weights.dora import DoRA

MAGNITUDE = r"(.*/)?magnitude"


@with_options_of(dora)
def bidora(holdout: float = 0.2, retrain: float = 0.25, orthogonal: float = 0.001, **kwargs: Any) -> Method:
    """BiDoRA: DoRA, optimized at two levels (Qin et al. 2024, arXiv:2410.09758). Takes the options of `dora`.

    A share `holdout` of the training records is the validation split of the upper level. Steps 1, 3, ... (from 0) take
    the gradient of the validation loss and update nothing. The step after each of them uses a batch of the other
    records. It updates the directions V, and all other trained leaves but the magnitudes, by the training loss. It
    updates the magnitudes m by the gradient of the validation loss one step of V ahead,
    `dL_val/dm - xi d2L_train/dm dV . dL_val/dV`, where xi is the learning rate. The product with the second derivative
    is the difference of two gradients of that batch, at V +- 0.01 dL_val/dV / ||dL_val/dV|| (Liu et al. 2019,
    arXiv:1806.09055, equation 8). For the last share `retrain` of the steps, the magnitudes are constant and the
    directions are trained on all records. `orthogonal` is the factor of the regularizer, the mean over all adapted
    layers of `||D^T D - I||`, where D is the direction with unit columns.
    """
    targets.check_positive(holdout=holdout)
    targets.check_fraction(holdout=holdout, retrain=retrain)
    if orthogonal:
        targets.check_positive(orthogonal=orthogonal)
    method = config_schema.call_with_group(dora, kwargs, "method")
    return dataclasses.replace(
        method,
        hooks=dataclasses.replace(
            method.hooks,
            holdout=holdout,
            regularizer=penalty_regularizer(_mean_distance, orthogonal),
            optimizer=lambda plain, steps: bilevel(plain, MAGNITUDE, steps - round(retrain * steps)),
        ),
    )


def _mean_distance(params: PyTree) -> jax.Array:
    weights = [w for w in jax.tree.leaves(params, is_leaf=weight.is_weight) if isinstance(w, DoRA)]
    return jnp.mean(jnp.concatenate([_distances(w) for w in weights]))


def _distances(w: DoRA) -> jax.Array:
    """One distance per layer, computed one layer at a time: each needs some copies of its kernel."""
    one = jax.checkpoint(_distance)
    return jax.lax.map(one, w) if len(w.shape) > 2 else one(w)[None]


def _distance(w: DoRA) -> jax.Array:
    """`||D^T D - I||` (Frobenius) of one layer, from the smaller of `D^T D` and `D D^T`, whose norms are the same.

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


def bilevel(plain: optax.GradientTransformation, upper: str, until: int) -> optax.GradientTransformationExtraArgs:
    """`plain`, which updates the leaves that `upper` matches by their hypergradient, and all others by their gradient.

    Updates 1, 3, ... (from 0) below `until` only record the gradient of a validation batch; the update after each of
    them changes both groups. The moments of a group that is not updated stay as they are.
    """

    def of(group: bool, leaves: PyTree) -> PyTree:
        """The leaves of the upper group, or of the other group, with zeros in place of all other leaves."""
        return tree.map_named(
            lambda name, x: x if bool(re.fullmatch(upper, name)) == group else jnp.zeros_like(x), leaves
        )

    def init(trained: PyTree) -> BilevelState:
        zeros = jax.tree.map(jnp.zeros_like, trained)
        return BilevelState(plain.init(trained), plain.init(trained), jnp.int32(0), zeros)

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
        looks = (t % 2 == 1) & (t < until)
        moves = (t % 2 == 0) & (t > 0) & (t - 1 < until)  # the upper group, by the gradient that was recorded
        mixed = functools.partial(_mixed, gradient_at, trained, of(False, state.held))
        ahead = jax.lax.cond(moves, mixed, lambda: jax.tree.map(jnp.zeros_like, trained))
        hyper = jax.tree.map(lambda g, m: g - lr * m, state.held, ahead)
        below, lower = plain.update(of(False, gradient), state.lower, trained, lr=lr)
        above, higher = plain.update(of(True, hyper), state.upper, trained, lr=lr)
        below, above = optax.tree.scale(1.0 - looks, of(False, below)), optax.tree.scale(1.0 * moves, of(True, above))
        return optax.tree.add(below, above), BilevelState(
            optax.tree.where(looks, state.lower, lower),
            optax.tree.where(moves, higher, state.upper),
            t + 1,
            optax.tree.where(looks, gradient, state.held),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _mixed(gradient_at: Callable[[PyTree], PyTree], trained: PyTree, direction: PyTree) -> PyTree:
    """The derivative of the gradient in `direction`, as the difference of two gradients."""
    step = 0.01 / jnp.maximum(optax.tree.norm(direction), 1e-12)
    sides = jnp.array([step, -step])
    gradients = jax.lax.map(lambda side: gradient_at(optax.tree.add_scale(trained, side, direction)), sides)
    return jax.tree.map(lambda g: (g[0] - g[1]) / (2 * step), gradients)
