"""Adapters beside a sublayer; `lowrank.methods.bottleneck` has their shapes."""

from lowrank.methods.bottleneck import adapters
from lowrank.methods.method import Method


def parallel(width: int = 64, activation: str = "relu", scale: float = 1.0, after: str = "mlp") -> Method:
    """Adapters beside a sublayer: `y + scale * up(act(down(x)))` for its input `x` (He et al. 2022, arXiv:2110.04366).

    `after` is `mlp`, `attn` or `both`. The input is what the sublayer itself reads, so normed in a pre-norm model.
    """
    return adapters(width, activation, scale, after, parallel=True)
