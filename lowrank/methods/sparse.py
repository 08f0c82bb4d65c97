"""Sparse fine-tuning as a method: some entries of the kernels are chosen, and only these are trained.

The share `density` of the entries of the targets is trained; see `lowrank.weights.sparse`. They are chosen by

  random     chance (Bhardwaj et al. 2024, SHiRA, arXiv:2406.13175, for this choice and the next one);
  magnitude  the largest |w|;
  fisher     the largest sum over examples of the squared gradient (Sung et al. 2021, FISH mask, arXiv:2111.09839);
  saliency   the largest |w * sum of gradients| (Lee et al. 2019, SNIP, arXiv:1810.02340);
  movement   the largest |w' - w| after all targets are trained by Adam for `batches` steps at `warm_lr`; then the
             weights are reset (Ansell et al. 2022, lottery-ticket sparse fine-tuning, arXiv:2110.07560).

The last three read the first `batches` batches before step 1, and need memory for dense gradients of the targets
(movement: for moments too).

Each kernel is compared on its own (`scope=kernel`) or all targets together (`scope=model`). In the second case, a
kernel of a layer has room for `capacity_factor * density` of its entries, so that the shapes do not depend on the data.
Where the largest scores of a kernel exceed it, the next ones of other kernels follow, so that the number of trained
entries is exactly the share `density`. Slots that stay free take memory and count as trained parameters in the tables.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank.core import tree, weight
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.core.weight import at_least_float32, materialize
from lowrank.methods import targets
from lowrank.methods.method import Context, Export, Hooks, Method
from lowrank.methods.options import check_unused
from lowrank.weights import sparse as form

Kernels = dict[str, jax.Array]  # dense, float32, by name
Gradient = Callable[[Kernels, PyTree, Mapping[str, jax.Array]], Kernels]
Forms = Mapping[str, form.Sparse]  # by name
Blind = Callable[[jax.Array, Any], jax.Array]  # (key, kernel) -> scores
Scores = Iterator[tuple[str, jax.Array]]  # (name, scores in the kernel's shape)


class Scope(NamedTuple):
    """The kernels that are compared with each other: the choice of indices by name, and the slots of a kernel."""

    select: Callable[[Forms, Scores, float], Kernels]
    capacity_factor: float | None  # the default; None where each kernel has as many slots as trained entries


def sparse(
    density: float = 0.005,
    choose: str = "magnitude",
    target: str = r".*(attn|mlp)/\w+/kernel",
    batches: int = 4,
    warm_lr: float = 1e-3,
    scope: str = "kernel",
    capacity_factor: float | None = None,
) -> Method:
    """Trains a share `density` of the entries of the kernels that `target` matches, chosen by `choose`.

    `choose` is one of the list at the top of this module, which also describes `scope` and `capacity_factor` (4 by
    default). Weight decay acts on the changes of the entries, so it draws the entries to their pretrained values.

    Differs from the paper: FISH, SNIP and lottery-ticket fine-tuning choose over the whole model, which is
    `scope=model` without its capacity, and among all parameters, where `target` is kernels. FISH also trains the
    classifier whole, and its expectation over the model's own labels is replaced by the data's. Lottery-ticket
    fine-tuning first trains all parameters for a whole run, with a penalty on the change. In all of them, decay draws
    an entry to 0.
    """
    if not 0 < density <= 1:
        raise UserError(f"method.density must be in (0, 1], not {density}")
    if choose not in (*BLIND, *SEEING):
        raise unknown("choice of places in method.choose", choose, (*BLIND, *SEEING))
    targets.check_positive(batches=batches, warm_lr=warm_lr)
    if choose in BLIND:
        check_unused(sparse, f"a method.choose of {', '.join(SEEING)}", batches=batches)
    if choose != "movement":
        check_unused(sparse, "method.choose=movement", warm_lr=warm_lr)
    factor = _capacity_factor(scope, capacity_factor)

    def adapt(key: jax.Array, w: Any, name: str) -> form.Sparse:
        targets.check_kernel(name)
        scores = BLIND.get(choose, BLIND["random"])(key, w)
        return form.attach(w, form.top_indices(scores, form.count_places(w, min(1.0, density * (factor or 1)))))

    score = (
        functools.partial(_seeing_scores, score=SEEING[choose], batches=batches, lr=warm_lr)
        if choose in SEEING
        else functools.partial(_blind_scores, score=BLIND[choose])
    )
    calibrate = functools.partial(_choose, score=score, select=SCOPES[scope].select, density=density)
    return Method(
        rules=((target, adapt),),
        export=Export(frozen=(rf"(?:{target})/indices",)),
        hooks=Hooks(calibrate=calibrate if choose in SEEING or factor else None),
    )


def _capacity_factor(scope: str, asked: float | None) -> float | None:
    """The slots of a kernel over its share of the trained entries, as far as the scope knows it."""
    if scope not in SCOPES:
        raise unknown("scope in method.scope", scope, SCOPES)
    default = SCOPES[scope].capacity_factor
    if asked is not None and default is None:
        raise UserError(f"method.capacity_factor={asked} does not act with method.scope={scope}: leave it out")
    if asked is not None and asked < 1:
        raise UserError(f"method.capacity_factor must be at least 1, so that every entry has a slot, not {asked}")
    return default if asked is None else asked


BLIND: dict[str, Blind] = {
    "random": lambda key, w: jax.random.uniform(key, w.shape),
    "magnitude": lambda key, w: jnp.abs(at_least_float32(materialize(w))),
}


def _choose(
    params: PyTree,
    context: Context,
    score: Callable[[Forms, PyTree, Context], Scores],
    select: Callable[[Forms, Scores, float], Kernels],
    density: float,
) -> PyTree:
    forms = {n: w for n, w in tree.named_leaves(params, weight.is_weight) if isinstance(w, form.Sparse)}
    chosen = select(forms, _checked(score(forms, params, context)), density)
    placed = {name: dataclasses.replace(w, indices=chosen[name]) for name, w in forms.items()}
    return tree.map_named(lambda n, w: placed.get(n, w), params, is_leaf=weight.is_weight)


def _checked(scores: Scores) -> Scores:
    for name, values in scores:
        if not jnp.isfinite(values).all():
            raise UserError(
                f"the scores of {name} are not finite, so its entries cannot be chosen: lower method.warm_lr, or check "
                "the base and the data"
            )
        yield name, values


def _per_kernel(forms: Forms, scores: Scores, density: float) -> Kernels:
    """The indices of the largest scores of each kernel."""
    del density
    return {name: form.top_indices(values, forms[name].indices.shape[-1]) for name, values in scores}


def _over_model(forms: Forms, scores: Scores, density: float) -> Kernels:
    """The indices of the largest scores of all kernels; of each kernel, only those that fit into its slots compete."""
    found = {name: form.top_scores(values, forms[name].indices.shape[-1]) for name, values in scores}
    total = max(1, round(density * sum(math.prod(w.shape) for w in forms.values())))
    masks = form.largest_mask([top for top, _ in found.values()], total)
    free = {name: w.shape[-2] * w.shape[-1] for name, w in forms.items()}
    return {
        name: jnp.sort(jnp.where(mask, indices, free[name]), axis=-1)
        for (name, (_, indices)), mask in zip(found.items(), masks, strict=True)
    }


SCOPES: dict[str, Scope] = {"kernel": Scope(_per_kernel, None), "model": Scope(_over_model, 4.0)}


def _blind_scores(forms: Forms, params: PyTree, context: Context, score: Blind) -> Scores:
    del params
    for name, w in forms.items():  # one kernel at a time, to bound the memory
        yield name, score(weight.name_key(context.key, name), w.base)


def _seeing_scores(
    forms: Forms, params: PyTree, context: Context, score: Callable[..., Kernels], batches: int, lr: float
) -> Scores:
    kernels = {name: at_least_float32(materialize(w.base)) for name, w in forms.items()}

    @jax.jit
    def gradient(kernels: Kernels, params: PyTree, batch: Mapping[str, jax.Array]) -> Kernels:
        def loss(kernels: Kernels) -> jax.Array:
            dense = tree.map_named(lambda n, w: kernels.get(n, w), params, is_leaf=weight.is_weight)
            sums = context.loss(dense, batch)
            return sums.total / jnp.maximum(sums.weight, 1e-8)

        return jax.grad(loss)(kernels)

    yield from score(kernels, gradient, params, context, batches, lr).items()


def _fisher(kernels: Kernels, gradient: Gradient, params: PyTree, context: Context, batches: int, lr: float) -> Kernels:
    del lr

    @jax.jit
    def add(scores: Kernels, kernels: Kernels, params: PyTree, batch: Mapping[str, jax.Array]) -> Kernels:
        def row(scores: Kernels, example: Mapping[str, jax.Array]) -> tuple[Kernels, None]:
            found = gradient(kernels, params, jax.tree.map(lambda x: x[None], example))
            return jax.tree.map(lambda s, g: s + g * g, scores, found), None

        return jax.lax.scan(row, scores, dict(batch))[0]

    scores = jax.tree.map(jnp.zeros_like, kernels)
    for batch in context.batches(batches):
        scores = add(scores, kernels, params, batch)
    return scores


def _saliency(
    kernels: Kernels, gradient: Gradient, params: PyTree, context: Context, batches: int, lr: float
) -> Kernels:
    del lr
    total = jax.tree.map(jnp.zeros_like, kernels)
    for batch in context.batches(batches):
        total = jax.tree.map(jnp.add, total, gradient(kernels, params, batch))
    return jax.tree.map(lambda w, g: jnp.abs(w * g), kernels, total)


def _movement(
    kernels: Kernels, gradient: Gradient, params: PyTree, context: Context, batches: int, lr: float
) -> Kernels:
    optimizer = optax.adam(lr)

    @jax.jit
    def step(moved: Kernels, state: Any, params: PyTree, batch: Mapping[str, jax.Array]) -> tuple[Kernels, Any]:
        updates, state = optimizer.update(gradient(moved, params, batch), state)
        return optax.apply_updates(moved, updates), state

    moved, state = kernels, optimizer.init(kernels)
    for batch in context.batches(batches):
        moved, state = step(moved, state, params, batch)
    return jax.tree.map(lambda a, b: jnp.abs(a - b), moved, kernels)


SEEING: dict[str, Callable[..., Kernels]] = {"fisher": _fisher, "saliency": _saliency, "movement": _movement}
