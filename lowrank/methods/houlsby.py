"""Adapters after both sublayers; `lowrank.methods.bottleneck` has their shapes."""

from lowrank.methods.bottleneck import adapters
from lowrank.methods.method import Method

NORMS = r"(layers|top)/(post_)?(attn|mlp)_norm/(scale|bias)"


def houlsby(width: int = 64, activation: str = "gelu", scale: float = 1.0, norms: bool = True) -> Method:
    """Adapters after attention and after the feed-forward layer (Houlsby et al. 2019, arXiv:1902.00751).

    `h + A(y)`, `A(y) = y + up(act(down(y)))`, for what the sublayer returns, `y`. As in the paper the blocks' norms
    are trained too, unless `norms` is off.
    """
    return adapters(width, activation, scale, "both", parallel=False, trainable=(NORMS,) if norms else ())
