"""One adapter a block; `lowrank.methods.bottleneck` has its shapes."""

from lowrank.methods.bottleneck import adapters
from lowrank.methods.method import Method


def pfeiffer(width: int = 64, activation: str = "relu", scale: float = 1.0) -> Method:
    """One adapter a block, after the feed-forward layer (Pfeiffer et al. 2020, arXiv:2005.00247).

    `y + scale * up(act(down(y)))` for what the layer returns, `y`, before it is added to the stream.
    """
    return adapters(width, activation, scale, "mlp", parallel=False)
