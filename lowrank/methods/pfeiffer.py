"""Pfeiffer adapters as a method: one adapter per block; see `lowrank.methods.bottleneck` for the shapes."""

from lowrank.methods.bottleneck import bottleneck_method
from lowrank.methods.method import Method


def pfeiffer(width: int = 64, activation: str = "relu", scale: float = 1.0) -> Method:
    """One adapter per block, after the feed-forward layer (Pfeiffer et al. 2020, arXiv:2005.00247).

    `y + scale * up(act(down(y)))`, where y is the output of the layer before the residual sum.
    """
    return bottleneck_method(width, activation, scale, "mlp", parallel=False)
