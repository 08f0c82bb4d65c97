"""Sparse fine-tuning as a method: some entries of the kernels are chosen, and only these are trained.

The share `density` of the entries of each kernel is trained; see `lowrank.weights.sparse`. They are chosen by

  random     chance (Bhardwaj et al. 2024, SHiRA, arXiv:2406.13175, for this choice and the next one);
  magnitude  the largest |w|;
  fisher     the largest sum over examples of the squared gradient (Sung et al. 2021, FISH mask, arXiv:2111.09839);
  saliency   the largest |w * sum of gradients| (Lee et al. 2019, SNIP, arXiv:1810.02340);
  movement   the largest |w' - w| after all targets are trained by Adam for `batches` steps at `warm_lr`; then the
             weights are reset (Ansell et al. 2022, lottery-ticket sparse fine-tuning, arXiv:2110.07560).

The last three read the first `batches` batches before step 1, and need memory for dense gradients of the targets
(movement: for moments too).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank.core import tree, weight
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.core.weight import at_least_float32, materialize
from lowrank.methods import targets
from lowrank.methods.method import Context, Export, Hooks, Method
from lowrank.weights import sparse as form

Kernels = dict[str, jax.Array]  # dense, float32, by name
Gradient = Callable[[Kernels, PyTree, Mapping[str, jax.Array]], Kernels]


def sparse(
    density: float = 0.005,
    choose: str = "magnitude",
    target: str = r".*(attn|mlp)/\w+/kernel",
    batches: int = 4,
    warm_lr: float = 1e-3,
) -> Method:
    """Trains a share `density` of the entries of each kernel that `target` matches, chosen by `choose`.

    `choose` is one of the list at the top of this module.
    """
    if not 0 < density <= 1:
        raise UserError(f"method.density must be in (0, 1], not {density}")
    if choose not in (*BLIND, *SEEING):
        raise unknown("choice of places in method.choose", choose, (*BLIND, *SEEING))
    targets.check_positive(batches=batches, warm_lr=warm_lr)

    def adapt(key: jax.Array, w: Any, name: str) -> form.Sparse:
        targets.check_kernel(name)
        scores = BLIND.get(choose, BLIND["random"])(key, w)
        return form.attach(w, form.top_indices(scores, form.count_places(w, density)))

    score = functools.partial(SEEING[choose], batches=batches, lr=warm_lr) if choose in SEEING else None
    return Method(
        rules=((target, adapt),),
        export=Export(frozen=(rf"(?:{target})/indices",)),
        hooks=Hooks(calibrate=functools.partial(_choose, score=score) if score else None),
    )


BLIND: dict[str, Callable[[jax.Array, Any], jax.Array]] = {
    "random": lambda key, w: jax.random.uniform(key, w.shape),
    "magnitude": lambda key, w: jnp.abs(at_least_float32(materialize(w))),
}


def _choose(params: PyTree, context: Context, score: Callable[..., Kernels]) -> PyTree:
    forms = {n: w for n, w in tree.named_leaves(params, weight.is_weight) if isinstance(w, form.Sparse)}
    kernels = {name: at_least_float32(materialize(w.base)) for name, w in forms.items()}

    @jax.jit
    def gradient(kernels: Kernels, params: PyTree, batch: Mapping[str, jax.Array]) -> Kernels:
        def loss(kernels: Kernels) -> jax.Array:
            dense = tree.map_named(lambda n, w: kernels.get(n, w), params, is_leaf=weight.is_weight)
            sums = context.loss(dense, batch)
            return sums.total / jnp.maximum(sums.weight, 1e-8)

        return jax.grad(loss)(kernels)

    scores = score(kernels, gradient, params, context)
    chosen = {
        n: dataclasses.replace(w, indices=form.top_indices(scores[n], w.indices.shape[-1])) for n, w in forms.items()
    }
    return tree.map_named(lambda n, w: chosen.get(n, w), params, is_leaf=weight.is_weight)


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
