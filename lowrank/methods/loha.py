"""LoHa as a method: the elementwise product of two low-rank matrices."""

from collections.abc import Mapping
from typing import Any

import jax

from lowrank.methods import targets
from lowrank.methods.method import Hooks, Method
from lowrank.weights import loha as form


def loha(
    rank: int = 8,
    alpha: float = 8.0,
    target: str = r".*attn/(q|v|qkv)/kernel",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Method:
    """LoHa: `W + alpha / rank * (A1 @ B1) * (A2 @ B2)` (Hyeon-Woo et al. 2021, arXiv:2108.06098).

    See `lowrank.weights.loha`. The patterns are as in `lora`.

    Differs from the paper: FedPara trains such a product alone; as in LyCORIS, it is added to a frozen kernel. The
    factors that are not 0 start Kaiming uniform, as in PEFT, where LyCORIS draws them from normal distributions of the
    standard deviations 0.1 and 1.
    """
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    targets.check_ranks(rank, alpha, rank_pattern, alpha_pattern)

    def adapt(key: jax.Array, w: Any, name: str) -> form.LoHa:
        ranks = targets.ranks(name, w.shape, rank, rank_pattern)
        return form.attach(key, w, ranks=ranks, alphas=targets.per_layer(name, w.shape, alpha, alpha_pattern))

    patterns = tuple((target, p) for p in (*rank_pattern, *alpha_pattern))
    return Method(rules=((target, adapt),), hooks=Hooks(by_layer=patterns))
