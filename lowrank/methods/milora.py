"""A mixture of LoRAs, routed by the prompt."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import BatchInfo, PyTree, Sums
from lowrank.methods import targets
from lowrank.methods.balance import balanced, check_balance, map_forms
from lowrank.methods.method import SHARED, Hooks, Method, TotalLoss
from lowrank.methods.options import own_meaning
from lowrank.weights import lora, mixture


@own_meaning("target")  # all the kernels of a layer that a prompt chooses among
def milora(
    rank: int = 8,
    alpha: float = 16.0,
    per_prompt: int = 3,
    balance: float = 0.01,
    target: str = r"layers/(attn/(q|k|v|o)|mlp/(gate|up|down))/kernel",
) -> Method:
    """MiLoRA: every LoRA of a layer is an expert, and the prompt chooses `per_prompt` of them (arXiv:2410.18035).

    `W x + gate * alpha / rank * B A x`. The gates of a layer are k times the top-k softmax of a linear router, so that
    the mean of the chosen gates is 1. The router reads the mean of the hidden states of the prompt at the input of the
    layer, after a GELU. The gates are computed once, from the prompt, and hold for every generated token. In training,
    the prompt of a sequence ends before its first answer, and that of a document is its first token; the prompt of a
    classifier is the whole sequence. `balance` is the factor of the balance loss, as in `more`. The adapter cannot be
    merged.
    """
    targets.check_positive(rank=rank, alpha=alpha, per_prompt=per_prompt)
    check_balance(balance)

    def adapt(key: jax.Array, w: Any, name: str) -> mixture.Gated:
        targets.check_rank(name, w.shape, rank)
        if len(w.shape) != 3:
            raise UserError(
                f"{name} is not in a stack of layers: MiLoRA routes within a layer, so target kernels [layers, in, out]"
            )
        made = lora.attach_equal_ranks(key, w, rank=rank, alpha=alpha)
        return mixture.Gated(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})

    def regularized(loss: TotalLoss, params: PyTree, batch: BatchInfo, scale: jax.Array) -> Sums:
        return loss(balanced(params, mixture.PromptRouter, balance * scale, batch))

    return Method(
        rules=((target, adapt),),
        trainable=(f"{SHARED}/router/.*",),
        bind=functools.partial(_bind, per_prompt=per_prompt),
        init_shared=functools.partial(_init_routers, target=target, per_prompt=per_prompt),
        hooks=Hooks(regularizer=regularized if balance else None),
    )


def _init_routers(base: PyTree, key: jax.Array, target: str, per_prompt: int) -> PyTree:
    """`{"router": {stack: [layers, D, members]}}`: a linear router for each layer, drawn at random."""
    routers = {}
    names = tree.match_names(target, tree.leaf_names(base, weight.is_weight), "target")
    for stack, members in _by_stack(names).items():
        if per_prompt > len(members):
            where = f"{target!r} matches in each layer: 1..{len(members)} of them can be chosen"
            raise UserError(f"method.per_prompt={per_prompt} exceeds the number of weights that {where}")
        layers = _leaf(base, members[0]).shape[0]
        width = _leaf(base, "embed/embedding").shape[-1]
        noise = jax.random.normal(weight.name_key(key, stack), (layers, width, len(members)))
        routers[stack] = noise * width**-0.5
    return {"router": routers}


def _bind(params: PyTree, batch: BatchInfo | None, rng: jax.Array | None, per_prompt: int) -> PyTree:
    """`params` with a PromptRouter in each stack, which reads the prompts of the batch, and each LoRA's place in it."""
    del rng
    if batch is None:
        return params
    seen: dict[str, Any] = {"segments": batch.segments}
    if batch.prompt is not None:
        seen["prompt"] = batch.prompt
    names = [n for n, w in tree.named_leaves(params, weight.is_weight) if type(w) is mixture.Gated]
    bound, member = dict(params), dict[str, int]()
    for stack, members in _by_stack(names).items():
        kernel = params[SHARED]["router"][stack]
        per_layer = {name: jnp.broadcast_to(x, (len(kernel), *x.shape)) for name, x in seen.items()}
        router = mixture.PromptRouter(kernel=kernel, per_prompt=per_prompt, **per_layer)
        bound[stack] = {**params[stack], weight.ROUTER: router}
        member |= {name: i for i, name in enumerate(members)}
    return map_forms(bound, mixture.Gated, lambda name, w: dataclasses.replace(w, member=member[name]))


def _by_stack(names: list[str]) -> dict[str, list[str]]:
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(name.split("/")[0], []).append(name)
    return stacks


def _leaf(params: PyTree, name: str) -> Any:
    for part in name.split("/"):
        params = params[part]
    return params
