"""AdaLoRA as a method: the optimizer prunes singular triplets of the adapted weights by their importance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank.core import weight
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.lora import bind_dropout
from lowrank.methods.method import Hooks, Method
from lowrank.methods.regularizers import penalty_regularizer
from lowrank.weights import adalora as form
from lowrank.weights.adalora import AdaLoRA


def adalora(
    init_rank: int = 12,
    target_rank: int = 8,
    alpha: float = 16.0,
    target: str = r".*attn/(q|k|v|o)/kernel",
    dropout: float = 0.0,
    tinit: float = 0.1,
    tfinal: float = 0.3,
    deltaT: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonal: float = 0.1,
) -> Method:
    """AdaLoRA: LoRA in SVD form, whose ranks are allocated during training (Zhang et al. 2023, arXiv:2303.10512).

    See `lowrank.weights.adalora` for the formula. Each weight starts with `init_rank` triplets, and the weights end
    with `target_rank` triplets on average. Nothing is pruned for the first `tinit` steps. After that, every `deltaT`
    steps, the least important triplets are pruned to a budget that falls as a cube, until `tfinal` steps before the
    end; the last choice stays. Values of `tinit` and `tfinal` below 1 are fractions of the run. The importance of a
    triplet is a product of the sensitivities |w dL/dw| of its entries and of their uncertainties, smoothed by `beta1`
    and `beta2`. `orthogonal` is the factor of the regularizer `sum ||A^T A - I||^2 + ||B B^T - I||^2`.

    Differs from the paper: A and B are drawn with the standard deviations `in ** -0.5` and `out ** -0.5`, where the
    authors' code takes 0.02 at any width. That code regularizes by the mean of the norms, not by the sum of their
    squares, which is the paper's formula.
    """
    targets.check_positive(init_rank=init_rank, target_rank=target_rank, alpha=alpha, deltaT=deltaT)
    targets.check_fraction(dropout=dropout, beta1=beta1, beta2=beta2)
    if target_rank > init_rank:
        raise UserError(f"method.target_rank {target_rank} is above method.init_rank {init_rank}")
    for name, value in (("tinit", tinit), ("tfinal", tfinal), ("orthogonal", orthogonal)):
        if value < 0:
            raise UserError(f"method.{name} must not be negative, not {value}")

    def adapt(key: jax.Array, w: Any, name: str) -> AdaLoRA:
        targets.check_rank(name, w.shape, init_rank)
        return form.attach(key, w, rank=init_rank, alpha=alpha, dropout=dropout)

    def optimizer(plain: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        first, last = targets.count_steps(tinit, steps), steps - targets.count_steps(tfinal, steps)
        if not first < last:
            run = plural(steps, "step")
            raise UserError(f"method.tinit {tinit} and method.tfinal {tfinal} leave none of {run} to prune in")
        share = functools.partial(kept_share, first=first, last=last, ratio=target_rank / init_rank)
        return allocate_budget(plain, share, first, last, deltaT, beta1, beta2)

    return Method(
        rules=((target, adapt),),
        bind=bind_dropout if dropout else None,
        hooks=Hooks(regularizer=penalty_regularizer(_orthogonality, orthogonal), optimizer=optimizer),
    )


def _orthogonality(params: PyTree) -> Any:
    weights = jax.tree.leaves(params, is_leaf=weight.is_weight)
    return sum(w.orthogonality() for w in weights if isinstance(w, AdaLoRA))


def kept_share(step: int, *, first: int, last: int, ratio: float) -> float:
    """The share of all triplets to keep after update `step` (from 1): 1 up to `first`, then a cube down to `ratio`."""
    left = 1 - (min(max(step, first), last) - first) / (last - first)
    return ratio + (1 - ratio) * left**3


class AllocationState(NamedTuple):
    """Trees in the shapes of the trained leaves, with MaskedNode at leaves that do not belong to an AdaLoRA."""

    inner: Any
    count: jax.Array  # type: ignore[assignment]  # the updates done; the name hides tuple.count
    sensitivity: PyTree
    uncertainty: PyTree
    kept: PyTree  # bool per entry of E


def allocate_budget(
    plain: optax.GradientTransformation,
    share: Callable[[int], float],
    first: int,
    last: int,
    every: int,
    beta1: float,
    beta2: float,
) -> optax.GradientTransformationExtraArgs:
    """`plain`, followed by setting the entries of E outside the budget to 0 (algorithm 1 of the paper).

    The budget after update t is the `int(share(t) * triplets)` most important triplets of all weights.
    """
    shares = np.array([share(step) for step in range(last + 1)])

    def init(trained: PyTree) -> AllocationState:
        zeros = _each(lambda w: jax.tree.map(jnp.zeros_like, w), trained)
        kept = _each(_all_kept, trained)
        return AllocationState(plain.init(trained), jnp.int32(0), zeros, zeros, kept)

    def update(
        gradient: PyTree, state: AllocationState, trained: PyTree, **extra: Any
    ) -> tuple[PyTree, AllocationState]:
        updates, inner = plain.update(gradient, state.inner, trained, **extra)
        t = state.count + 1
        smooth = functools.partial(_smoothed, jnp.where(t <= last, beta1, 1.0), jnp.where(t <= last, beta2, 1.0))
        both = _each(smooth, trained, gradient, state.sensitivity, state.uncertainty)
        sensitivity, uncertainty = (_each(lambda w, pair, i=i: pair[i], trained, both) for i in (0, 1))
        due = ((t > first) & (t < last) & (t % every == 0)) | (t == last)
        scores = jax.tree.leaves(_each(_importance, trained, sensitivity, uncertainty))
        budgets = jnp.asarray((shares * sum(score.size for score in scores) + 1e-9).astype(np.int32))
        before = jax.tree.leaves(state.kept)
        chosen = jax.lax.cond(due, lambda: _best(scores, budgets[jnp.minimum(t, last)]), lambda: before)
        kept = jax.tree.unflatten(jax.tree.structure(state.kept), chosen)
        prune = functools.partial(_pruned, due | (t >= last))
        updates = jax.tree.map(
            lambda w, u, k: prune(w, u, k) if _is_form(w) else u, trained, updates, kept, is_leaf=_is_form
        )
        return updates, AllocationState(inner, t, sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_form(x: Any) -> bool:
    return isinstance(x, AdaLoRA)


def _each(fn: Callable[..., Any], trained: PyTree, *rest: PyTree) -> PyTree:
    """`fn` of every AdaLoRA of the trained tree, and MaskedNode in place of every other leaf."""
    return jax.tree.map(
        lambda w, *r: fn(w, *r) if _is_form(w) else optax.MaskedNode(), trained, *rest, is_leaf=_is_form
    )


def _all_kept(w: AdaLoRA) -> AdaLoRA:
    nothing = optax.MaskedNode()
    return dataclasses.replace(w, a=nothing, b=nothing, e=jnp.ones(w.e.shape, bool))


def _smoothed(beta1: Any, beta2: Any, w: AdaLoRA, gradient: AdaLoRA, old: AdaLoRA, unsure: AdaLoRA) -> tuple:
    """`(sensitivity, uncertainty)`: the averages of |w g| and of the distance of |w g| to its average."""
    now = jax.tree.map(lambda x, g: jnp.abs(x * g), w, gradient)
    average = jax.tree.map(lambda o, x: beta1 * o + (1 - beta1) * x, old, now)
    spread = jax.tree.map(lambda u, x, m: beta2 * u + (1 - beta2) * jnp.abs(x - m), unsure, now, average)
    return average, spread


def _importance(w: AdaLoRA, sensitivity: AdaLoRA, uncertainty: AdaLoRA) -> jax.Array:
    """`[..., r]`: the score of the entry of E, plus the mean scores of its column of A and of its row of B."""
    del w
    score = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
    return score.e + jnp.mean(score.a, axis=-2) + jnp.mean(score.b, axis=-1)


def _best(scores: list[jax.Array], budget: jax.Array) -> list[jax.Array]:
    """Bools in the shapes of the scores: true for the `budget` largest of all, and for the first of equal ones."""
    flat = jnp.concatenate([score.reshape(-1) for score in scores])
    order = jnp.argsort(-flat, stable=True)
    chosen = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < budget)
    cuts = np.cumsum([score.size for score in scores])[:-1]
    parts = jnp.split(chosen, cuts)
    return [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]


def _pruned(active: jax.Array, w: AdaLoRA, update: AdaLoRA, kept: AdaLoRA) -> AdaLoRA:
    """The update after which the entries of E that are not kept are 0."""
    return dataclasses.replace(update, e=jnp.where(active & ~kept.e, -w.e, update.e))
