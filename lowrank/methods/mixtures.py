"""Mixtures of low-rank experts on a dense model: routed by the token (`more`, `smore`), or by the prompt (`milora`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank import tree, weight
from lowrank.errors import UserError, unknown
from lowrank.methods import targets
from lowrank.methods.method import SHARED, Bind, Method
from lowrank.weights import lora, mixture
from lowrank.weights import smore as forest

PyTree = Any
Batch = Mapping[str, jax.Array]


def more(
    rank: int = 4,
    experts: int = 4,
    per_token: int = 2,
    alpha: float = 16.0,
    balance: float = 0.01,
    target: str = r".*attn/(q|v)/kernel",
) -> Method:
    """A mixture of `experts` LoRAs on each target, `per_token` of them for each token, chosen by a router of its own.

    `W x + alpha / rank * sum_e g_e(x) B_e A_e x` with g the top-k softmax of a linear router (MoLoRA, Zadouri et al.
    2023, arXiv:2309.05444; MoRE). `balance` weighs the loss `E * sum_e f_e P_e` that keeps the experts in use (Fedus et
    al. 2021, arXiv:2101.03961); it is part of the gradient, not of the loss reported. It cannot be merged.
    """
    targets.positive(rank=rank, alpha=alpha, experts=experts)
    _check_share("per_token", per_token, experts, balance)

    def adapt(key: jax.Array, w: Any, name: str) -> mixture.Mixture:
        targets.check_rank(name, w.shape, rank)
        return mixture.attach(key, w, rank=rank, experts=experts, alpha=alpha, per_token=per_token)

    return Method(rewrite=((target, adapt),), bind=_in_balance(mixture.Mixture, balance))


def smore(
    rank: int = 2,
    experts: Sequence[int] = (4, 4),
    fanout: Sequence[int] = (2, 2),
    scale: float = 1.0,
    gate: int = 16,
    activation: str = "tanh",
    balance: float = 0.01,
    target: str = r".*attn/(q|v)/kernel",
) -> Method:
    """S'MoRE: each token meets a tree of residual low-rank experts (Zeng et al. 2025, arXiv:2504.06426).

    `experts` and `fanout` say, from the leaves up, how many experts a level has, and how many of them hang below one
    node; `gate` is the width of the routers: of the narrowed token, queries and keys. See `lowrank.weights.smore` for
    the formula, and `more` for `balance`. It cannot be merged.
    """
    targets.positive(rank=rank, gate=gate, scale=scale)
    if not experts or len(experts) != len(fanout):
        raise UserError(f"method.experts has {len(experts)} levels and method.fanout {len(fanout)}")
    for count, below in zip(experts, fanout, strict=True):
        _check_share("fanout", below, count, balance)
    if activation not in forest.ACTIVATIONS:
        raise unknown("S'MoRE activation", activation, forest.ACTIVATIONS)

    def adapt(key: jax.Array, w: Any, name: str) -> forest.SMoRE:
        targets.check_rank(name, w.shape, rank)
        shape = {"rank": rank, "experts": experts, "fanout": fanout, "gate": gate}
        return forest.attach(key, w, **shape, scale=scale, activation=activation)

    return Method(rewrite=((target, adapt),), bind=_in_balance(forest.SMoRE, balance))


def _in_balance(kind: type, balance: float) -> Bind:
    def bind(params: PyTree, batch: Batch | None, rng: jax.Array | None) -> PyTree:
        if rng is None or batch is None or not balance:
            return params
        return _each(params, kind, lambda name, w: _balanced(w, batch, balance))

    return bind


def _check_share(name: str, count: int, experts: int, balance: float) -> None:
    if not 1 <= count <= experts:
        raise UserError(f"method.{name}={count} is not in 1..{experts}, the number of experts")
    if balance < 0:
        raise UserError(f"method.balance must not be negative, not {balance}")


def _each(params: PyTree, kind: type, fn: Any) -> PyTree:
    return tree.map_named(lambda name, w: fn(name, w) if type(w) is kind else w, params, is_leaf=weight.is_weight)


def _counted(batch: Batch) -> jax.Array:
    """The sum of weights that the gradient is divided by: what is added in proportion to it keeps its strength."""
    return jnp.sum((batch["weights"] if "weights" in batch else batch["valid"]).astype(jnp.float32))


def _balanced(w: Any, batch: Batch, balance: float) -> Any:
    stack = w.shape[:-2]
    mask = (batch["segments"] > 0).astype(jnp.float32)
    strength = jnp.broadcast_to(balance * _counted(batch), stack)
    return dataclasses.replace(w, mask=jnp.broadcast_to(mask, (*stack, *mask.shape)), strength=strength)


def milora(
    rank: int = 8,
    alpha: float = 16.0,
    per_prompt: int = 3,
    balance: float = 0.01,
    target: str = r"layers/(attn/(q|k|v|o)|mlp/(gate|up|down))/kernel",
) -> Method:
    """MiLoRA: every LoRA of a layer is an expert, and the prompt chooses `per_prompt` of them (arXiv:2410.18035).

    `W x + gate * alpha / rank * B A x`. A layer's gates are k times the top-k softmax of a linear router, so that their
    mean over those chosen is 1; it sees the hidden states of the prompt that enter the layer, their mean through a
    GELU. They are computed once, from the prompt, and stay for all that is generated. `balance` is as for `more`. In
    training a prompt is what comes before the first token of full weight of its sequence; a classifier's is all of it.
    It cannot be merged.
    """
    targets.positive(rank=rank, alpha=alpha)
    _check_share("per_prompt", per_prompt, per_prompt, balance)

    def adapt(key: jax.Array, w: Any, name: str) -> mixture.Gated:
        targets.check_rank(name, w.shape, rank)
        if len(w.shape) != 3:
            raise UserError(f"{name} is in no stack of layers: MiLoRA routes within a layer")
        made = lora.attach_even(key, w, rank=rank, alpha=alpha)
        return mixture.Gated(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})

    def share(base: PyTree, key: jax.Array) -> PyTree:
        routers = {}
        for stack, names in _by_stack(tree.matching(target, tree.names(base, weight.is_weight), "target")).items():
            if per_prompt > len(names):
                raise UserError(f"method.per_prompt={per_prompt}, but {target!r} matches {len(names)} weights a layer")
            layers = _leaf(base, names[0]).shape[0]
            width = _leaf(base, "embed/embedding").shape[-1]
            noise = jax.random.normal(weight.name_key(key, stack), (layers, width, len(names)))
            routers[stack] = noise * width**-0.5
        return {"router": routers}

    def bind(params: PyTree, batch: Batch | None, rng: jax.Array | None) -> PyTree:
        if batch is None:
            return params
        seen = {"segments": batch["segments"]}
        if "weights" in batch:
            seen["prompt"] = is_prompt(batch["segments"], batch["weights"])
        if rng is not None and balance:
            seen["strength"] = balance * _counted(batch)
        names = [n for n, w in tree.named_leaves(params, weight.is_weight) if type(w) is mixture.Gated]
        bound, member = dict(params), {}
        for stack, members in _by_stack(names).items():
            kernel = params[SHARED]["router"][stack]
            each = {name: jnp.broadcast_to(x, (len(kernel), *x.shape)) for name, x in seen.items()}
            router = mixture.PromptRouter(kernel=kernel, per_prompt=per_prompt, **each)
            bound[stack] = {**params[stack], weight.ROUTER: router}
            member |= {name: i for i, name in enumerate(members)}
        return _each(bound, mixture.Gated, lambda name, w: dataclasses.replace(w, member=member[name]))

    return Method(rewrite=((target, adapt),), train=(f"{SHARED}/router/.*",), share=share, bind=bind)


def _by_stack(names: list[str]) -> dict[str, list[str]]:
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(name.split("/")[0], []).append(name)
    return stacks


def _leaf(params: PyTree, name: str) -> Any:
    for part in name.split("/"):
        params = params[part]
    return params


def is_prompt(segments: jax.Array, weights: jax.Array) -> jax.Array:
    """`[rows, tokens]` bool: the tokens of a sequence up to the first that was the target of a full weight.

    `weights[t]` is that of the target of token t, which is token t + 1; so the first token is always of the prompt.
    """
    same = segments[:, :, None] == segments[:, None, :]
    before = jnp.tril(jnp.ones(same.shape[1:], bool), -1)[None] & same
    answered = jnp.any(before & (weights >= 1)[:, None, :], axis=-1)
    return ~answered & (segments > 0)
