"""Parallel adapters as a method: adapters beside a sublayer; see `lowrank.methods.bottleneck` for the shapes."""

from lowrank.methods.bottleneck import bottleneck_method
from lowrank.methods.method import Method


def parallel(width: int = 64, activation: str = "relu", scale: float = 1.0, after: str = "mlp") -> Method:
    """Adapters beside a sublayer: `y + scale * up(act(down(x)))` for its input `x` (He et al. 2022, arXiv:2110.04366).

    `after` is `mlp`, `attn` or `both`. The adapter reads the input of the sublayer, which a pre-norm model has normed,
    as it does by default in the authors' code (jxhe/unify-parameter-efficient-tuning).
    """
    return bottleneck_method(width, activation, scale, after, parallel=True)
