"""S'MoRE as a method: a tree of low-rank experts, routed by the token."""

from collections.abc import Sequence
from typing import Any

import jax

from lowrank.core.errors import UserError, plural, unknown
from lowrank.methods import targets
from lowrank.methods.balance import balance_regularizer, check_routing
from lowrank.methods.method import Hooks, Method
from lowrank.weights import smore as forest


def smore(
    rank: int = 2,
    experts: Sequence[int] = (4, 4),
    fanout: Sequence[int] = (2, 2),
    scale: float = 1.0,
    gate: int = 16,
    activation: str = "tanh",
    balance: float = 0.01,
    target: str = r".*attn/(q|v|qkv)/kernel",
) -> Method:
    """S'MoRE: each token is routed through a tree of residual low-rank experts (Zeng et al. 2025, arXiv:2504.06426).

    `experts` and `fanout` give, from the leaves up, the number of experts of each level and the number of children of
    each node. `gate` is the width of the routers: of the narrowed token, the queries and the keys. See
    `lowrank.weights.smore` for the formula, and `more` for `balance`. The adapter cannot be merged.

    Differs from the paper: one rank for all levels, no biases in the products, and no learned slope of a PReLU, which
    the authors' code (ZimpleX/SMoRE-LLM) has.
    """
    targets.check_positive(rank=rank, gate=gate, scale=scale)
    if not experts or len(experts) != len(fanout):
        raise UserError(f"method.experts has {plural(len(experts), 'level')} and method.fanout {len(fanout)}")
    for count, below in zip(experts, fanout, strict=True):
        check_routing("fanout", below, count, balance)
    if activation not in forest.ACTIVATIONS:
        raise unknown("S'MoRE activation", activation, forest.ACTIVATIONS)

    def adapt(key: jax.Array, w: Any, name: str) -> forest.SMoRE:
        targets.check_rank(name, w.shape, rank)
        shape: dict[str, Any] = {"rank": rank, "experts": experts, "fanout": fanout, "gate": gate}
        return forest.attach(key, w, **shape, scale=scale, activation=activation)

    return Method(rules=((target, adapt),), hooks=Hooks(regularizer=balance_regularizer(forest.SMoRE, balance)))
