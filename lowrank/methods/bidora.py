"""BiDoRA as a method: DoRA whose directions and magnitudes learn in turns, from records of their own."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank import settings, tree, weight
from lowrank.methods import states, targets
from lowrank.methods.dora import dora
from lowrank.methods.method import Method
from lowrank.weights.dora import DoRA

PyTree = Any
MAGNITUDE = r"(.*/)?magnitude"


def bidora(holdout: float = 0.2, retrain: float = 0.25, orthogonal: float = 0.001, **kwargs: Any) -> Method:
    """BiDoRA: DoRA's options, in two levels (Qin et al. 2024, arXiv:2410.09758).

    A share `holdout` of the training records is the upper level's validation split. Steps 0, 2, ... move the
    directions (and what else is trained) by batches of the others; steps 1, 3, ... move the magnitudes by batches of
    those. For the last share `retrain` of the steps the magnitudes stand, and the directions learn from all records.
    `orthogonal` weighs the mean over all adapted layers of `||D^T D - I||`, D being the direction with unit columns.

    The magnitudes' gradient is of first order: it takes the directions as they are, where the paper also asks what
    a step of theirs would make of a change of the magnitudes.
    """
    targets.positive(holdout=holdout)
    targets.fraction(holdout=holdout, retrain=retrain)
    if orthogonal:
        targets.positive(orthogonal=orthogonal)
    method = settings.call(dora, kwargs, "method")
    return dataclasses.replace(
        method,
        holdout=holdout,
        penalty=functools.partial(_penalty, orthogonal) if orthogonal else None,
        optimizer=lambda plain, steps: alternating(plain, MAGNITUDE, steps - round(retrain * steps)),
    )


def _penalty(factor: float, params: PyTree) -> jax.Array:
    weights = [w for w in jax.tree.leaves(params, is_leaf=weight.is_weight) if isinstance(w, DoRA)]
    return factor * jnp.mean(jnp.concatenate([_distances(w) for w in weights]))


def _distances(w: DoRA) -> jax.Array:
    """One distance a layer, computed layer by layer: each needs some copies of its kernel."""
    one = jax.checkpoint(_distance)
    return jax.lax.map(one, w) if len(w.shape) > 2 else one(w)[None]


def _distance(w: DoRA) -> jax.Array:
    """`||D^T D - I||` (Frobenius) of one layer, from the smaller of `D^T D` and `D D^T`, whose norms are the same.

    Columns have unit length, so `||D^T D - I||^2 = ||D^T D||^2 - out`.
    """
    direction = weight.wide(weight.materialize(w.base)) + w.delta()
    d = direction / jnp.linalg.norm(direction, axis=0, keepdims=True)
    n_in, n_out = d.shape
    gram = d.T @ d if n_out <= n_in else d @ d.T
    square = jnp.sum(jnp.square(gram)) - n_out
    return jnp.sqrt(jnp.maximum(square, 1e-12))


class AlternatingState(NamedTuple):
    """A whole state for each of the two groups, so that each one's moments are of its own batches."""

    lower: Any
    upper: Any
    count: jax.Array  # updates done


def alternating(plain: optax.GradientTransformation, upper: str, until: int) -> optax.GradientTransformation:
    """`plain` for the leaves that `upper` matches at updates 1, 3, ... (from 0) below `until`, else for all others.

    Who rests keeps its moments; the schedule goes on for both.
    """

    def of(group: bool, leaves: PyTree) -> PyTree:
        """The leaves of the upper group, or of the other one, with zeros in place of the rest."""
        return tree.map_named(
            lambda name, x: x if bool(re.fullmatch(upper, name)) == group else jnp.zeros_like(x), leaves
        )

    def init(trained: PyTree) -> AlternatingState:
        return AlternatingState(plain.init(trained), plain.init(trained), jnp.int32(0))

    def update(gradient: PyTree, state: AlternatingState, trained: PyTree) -> tuple[PyTree, AlternatingState]:
        turn = (state.count % 2 == 1) & (state.count < until)
        below, lower = plain.update(of(False, gradient), state.lower, trained)
        above, higher = plain.update(of(True, gradient), state.upper, trained)
        updates = jax.tree.map(lambda a, b: jnp.where(turn, a, b), of(True, above), of(False, below))
        return updates, AlternatingState(
            states.choose(turn, state.lower, lower, lower),
            states.choose(turn, higher, state.upper, higher),
            state.count + 1,
        )

    return optax.GradientTransformation(init, update)
