"""A mixture of LoRAs as a method, routed by the token."""

from typing import Any

import jax

from lowrank.methods import targets
from lowrank.methods.balance import balance_regularizer, check_routing
from lowrank.methods.method import Hooks, Method
from lowrank.weights import mixture


def more(
    rank: int = 4,
    experts: int = 4,
    per_token: int = 2,
    alpha: float = 16.0,
    balance: float = 0.01,
    target: str = r".*attn/(q|v|qkv)/kernel",
) -> Method:
    """A mixture of `experts` LoRAs on each target; the target's own router chooses `per_token` of them for each token.

    `W x + alpha / rank * sum_e g_e(x) B_e A_e x`, where g is the top-k softmax of a linear router (MoLoRA, Zadouri et
    al. 2023, arXiv:2309.05444; MoRE). `balance` is the factor of the balance loss `E * sum_e f_e P_e`, a regularizer
    that keeps all experts in use (Fedus et al. 2021, arXiv:2101.03961). The adapter cannot be merged.

    Differs from the paper: MoLoRA weighs all experts of a token by the softmax and has no balance loss, which is
    `per_token=experts` and `balance=0` here.
    """
    targets.check_positive(rank=rank, alpha=alpha, experts=experts)
    check_routing("per_token", per_token, experts, balance)

    def adapt(key: jax.Array, w: Any, name: str) -> mixture.Mixture:
        targets.check_rank(name, w.shape, rank)
        return mixture.attach(key, w, rank=rank, experts=experts, alpha=alpha, per_token=per_token)

    return Method(rules=((target, adapt),), hooks=Hooks(regularizer=balance_regularizer(mixture.Mixture, balance)))
