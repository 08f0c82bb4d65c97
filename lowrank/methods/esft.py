"""ESFT as a method: trains the experts of a mixture that the task uses most."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core import tree, weight
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.method import Context, Export, Hooks, Method
from lowrank.methods.options import own_meaning
from lowrank.weights import selected_experts

ROUTER = r"(layers|top)/mlp/router/kernel"
SHARES = {"gate": 0.1, "token": 0.2}  # the paper's p for each score


@own_meaning("target")
def esft(
    share: float | None = None,
    score: str = "gate",
    capacity: float = 0.25,
    batches: int = 4,
    target: str = r"(layers|top)/mlp/experts/(gate|up|down)/kernel",
) -> Method:
    """ESFT: only the experts that the task uses most are trained (Wang et al. 2024, arXiv:2407.01906).

    Before the first step, `batches` batches measure the relevance of each expert over real tokens: its average gate
    (`score='gate'`), or the share of the choices that fell on it (`'token'`). Each layer trains the fewest experts
    whose relevance adds up to `share` of the layer's; by default, to the paper's 0.1 for gates and 0.2 for choices.
    Weight decay acts on the change of an expert, so it draws the expert to its pretrained kernel.

    Differs from the paper: at most a share `capacity` of all experts is trained, so that the shapes do not depend on
    the data; decay draws an expert to 0 there; the sample is 32 sequences of 4096 tokens there. All tokens have the
    same weight, as in the authors' code (deepseek-ai/ESFT); the paper takes the mean of each sequence first. Relevance
    is relative to the layer, as in the paper and in the scores that the authors publish; their script for new scores
    divides by the sum of an expert over layers.
    """
    if score not in SHARES:
        raise unknown("ESFT score", score, SHARES)
    reached: float = SHARES[score] if share is None else share
    targets.check_positive(share=reached, capacity=capacity, batches=batches)
    for name, value in (("share", reached), ("capacity", capacity)):
        if value > 1:
            raise UserError(f"method.{name} must be at most 1, not {value}")

    def adapt(key: jax.Array, w: Any, name: str) -> selected_experts.SelectedExperts:
        del key
        if len(w.shape) < 4:
            raise UserError(
                f"{name} does not hold experts: ESFT trains the kernels [layers, experts, in, out] of a mixture"
            )
        return selected_experts.attach(w, math.ceil(capacity * w.shape[-3]))

    def calibrate(params: PyTree, context: Context) -> PyTree:
        used = relevance(params, context, score, batches)

        def filled(name: str, w: Any) -> Any:
            if type(w) is not selected_experts.SelectedExperts:
                return w
            rows = select_experts(used[name.split("/")[0]], reached, w.rows.shape[-1])
            return selected_experts.SelectedExperts(base=w.base, delta=w.delta, rows=jnp.asarray(rows))

        return tree.map_named(filled, params, is_leaf=weight.is_weight)

    return Method(
        rules=((target, adapt),),
        export=Export(frozen=(rf"({target})/rows",)),
        hooks=Hooks(calibrate=calibrate),
    )


def relevance(params: PyTree, context: Context, score: str, batches: int) -> Mapping[str, np.ndarray]:
    """The relevance of each expert, `[layers, experts]` per stack; the sum over the experts of a layer is 1."""
    named = dict(tree.named_leaves(params, weight.is_weight))
    routers = {name: named[name] for name in tree.match_names(ROUTER, named, "router")}
    options = {"per_token": context.model.experts_per_token, "normalize_gates": context.model.normalize_gates}

    @functools.partial(jax.jit)
    def tallied(params: PyTree, batch: Any) -> dict[str, jax.Array]:
        mask = (context.batch_info(batch).segments > 0).astype(jnp.float32)

        def loss(tallies: dict[str, jax.Array]) -> jax.Array:
            def probed(name: str, w: Any) -> Any:
                if name not in tallies:
                    return w
                seen = jnp.broadcast_to(mask, (w.shape[0], *mask.shape))
                return selected_experts.ExpertUsageProbe(base=w, tally=tallies[name], mask=seen, score=score, **options)

            return context.loss(tree.map_named(probed, params, is_leaf=weight.is_weight), batch).total

        zeros = {name: jnp.zeros((w.shape[0], w.shape[-1]), jnp.float32) for name, w in routers.items()}
        return jax.grad(loss)(zeros)

    found = [jax.device_get(tallied(params, batch)) for batch in context.batches(batches)]
    sums = {name.split("/")[0]: np.sum([np.asarray(f[name], np.float64) for f in found], axis=0) for name in routers}
    return {stack: use / np.maximum(use.sum(-1, keepdims=True), 1e-30) for stack, use in sums.items()}


def select_experts(used: np.ndarray, share: float, slots: int) -> np.ndarray:
    """`[layers, slots]` int32: the fewest experts whose relevance reaches `share`, in falling order, padded with E."""
    layers, experts = used.shape
    rows = np.full((layers, slots), experts, np.int32)
    for layer, use in enumerate(used):
        order = np.argsort(-use, kind="stable")
        enough = int(np.searchsorted(np.cumsum(use[order]), share - 1e-9)) + 1
        rows[layer, : min(enough, slots)] = order[: min(enough, slots)]
    return rows
