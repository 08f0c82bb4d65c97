"""LoKr as a method: a Kronecker product."""

from collections.abc import Mapping
from typing import Any

import jax

from lowrank.core.errors import UserError
from lowrank.methods import targets
from lowrank.methods.method import Hooks, Method
from lowrank.weights import lokr as form


def lokr(
    rank: int = 8,
    alpha: float = 8.0,
    target: str = r".*attn/(q|v|qkv)/kernel",
    factor: int = -1,
    decompose_both: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Method:
    """LoKr: `W + alpha / rank * kron(W1, W2)` (Yeh et al. 2023, arXiv:2309.14859).

    `factor` is the number of parts that W1 makes of the inputs and of the outputs (-1: about their square roots). W2
    has low rank where that is below half of its larger side, and so has W1 with `decompose_both`. See
    `lowrank.weights.lokr`. The patterns are as in `lora`.

    Differs from the paper: W1, or its B, is 0 at first, as in PEFT, where LyCORIS starts with W2 at 0. The scale of two
    full matrices is alpha / rank, as in PEFT, where LyCORIS takes 1.
    """
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    targets.check_ranks(rank, alpha, rank_pattern, alpha_pattern)
    if factor < 1 and factor != -1:
        raise UserError(f"method.factor must be -1 or at least 1, not {factor}")

    def adapt(key: jax.Array, w: Any, name: str) -> form.LoKr:
        ranks = targets.ranks(name, w.shape, rank, rank_pattern)
        alphas = targets.per_layer(name, w.shape, alpha, alpha_pattern)
        try:
            return form.attach(key, w, ranks=ranks, alphas=alphas, factor=factor, both=decompose_both)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None

    patterns = tuple((target, p) for p in (*rank_pattern, *alpha_pattern))
    return Method(rules=((target, adapt),), hooks=Hooks(by_layer=patterns))
