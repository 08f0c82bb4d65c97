"""HiRA as a method: an elementwise product of the kernel with a low-rank matrix."""

from collections.abc import Mapping
from typing import Any

import jax

from lowrank.methods import targets
from lowrank.methods.method import Hooks, Method
from lowrank.weights import hira as form


def hira(
    rank: int = 32, target: str = r".*attn/(q|v|qkv)/kernel", rank_pattern: Mapping[str, int] | None = None
) -> Method:
    """HiRA: `W * (1 + A @ B)`, entry by entry (Huang et al., ICLR 2025, openreview TwJrTz9cRS).

    See `lowrank.weights.hira`. `rank_pattern` is as in `lora`. Raises UserError for a rank above min(in, out) of a
    target.
    """
    rank_pattern = dict(rank_pattern or {})
    targets.check_ranks(rank, 1.0, rank_pattern, {})

    def adapt(key: jax.Array, w: Any, name: str) -> form.HiRA:
        return form.attach(key, w, ranks=targets.ranks(name, w.shape, rank, rank_pattern))

    return Method(rules=((target, adapt),), hooks=Hooks(by_layer=tuple((target, p) for p in rank_pattern)))
