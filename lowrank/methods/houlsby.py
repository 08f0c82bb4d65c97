"""Houlsby adapters as a method: adapters after both sublayers; see `lowrank.methods.bottleneck` for the shapes."""

from lowrank.methods.bottleneck import bottleneck_method
from lowrank.methods.method import Method

NORMS = r"((layers|top)/(post_)?(attn|mlp)_norm|embed/norm)/(scale|bias)"


def houlsby(width: int = 64, activation: str = "gelu", scale: float = 1.0, norms: bool = True) -> Method:
    """Adapters after attention and after the feed-forward layer (Houlsby et al. 2019, arXiv:1902.00751).

    `h + A(y)`, `A(y) = y + up(act(down(y)))`, where y is the output of the sublayer. As in the paper, the norms of the
    blocks and of the embeddings are trained too, unless `norms` is off.

    Differs from the paper: up is 0 at first, so that the model is unchanged, where the paper draws both kernels from a
    normal distribution of standard deviation 0.01, truncated at two of them.
    """
    return bottleneck_method(width, activation, scale, "both", trainable=(NORMS,) if norms else ())
