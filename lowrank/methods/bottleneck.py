"""Bottleneck adapters: two small layers inside every block, `y + scale * up(act(down(x)))`, with up = 0 at first.

`down` is `[D, width]`, `up` `[width, D]`, both with a bias: 2 D width + width + D parameters an adapter. Each is added
to what its sublayer adds to the stream, before the residual sum (and before a post-norm). The model is unchanged at
attach. `activation` is a name of `lowrank.models.layers.ACTIVATIONS`.
"""

from lowrank.errors import unknown
from lowrank.methods import targets
from lowrank.methods.method import Method

ADAPTERS = r"(layers|top)/(attn|mlp)_adapter/.*"
NORMS = r"(layers|top)/(post_)?(attn|mlp)_norm/(scale|bias)"
PLACES = {"both": ("attn", "mlp"), "attn": ("attn",), "mlp": ("mlp",)}


def houlsby(width: int = 64, activation: str = "gelu", scale: float = 1.0, norms: bool = True) -> Method:
    """Adapters after attention and after the feed-forward layer (Houlsby et al. 2019, arXiv:1902.00751).

    `h + A(y)`, `A(y) = y + up(act(down(y)))`, for what the sublayer returns, `y`. As in the paper the blocks' norms
    are trained too, unless `norms` is off.
    """
    return _adapters(width, activation, scale, "both", parallel=False, train=(NORMS,) if norms else ())


def pfeiffer(width: int = 64, activation: str = "relu", scale: float = 1.0) -> Method:
    """One adapter a block, after the feed-forward layer (Pfeiffer et al. 2020, arXiv:2005.00247).

    `y + scale * up(act(down(y)))` for what the layer returns, `y`, before it is added to the stream.
    """
    return _adapters(width, activation, scale, "mlp", parallel=False)


def parallel(width: int = 64, activation: str = "relu", scale: float = 1.0, after: str = "mlp") -> Method:
    """Adapters beside a sublayer: `y + scale * up(act(down(x)))` for its input `x` (He et al. 2022, arXiv:2110.04366).

    `after` is `mlp`, `attn` or `both`. The input is what the sublayer itself reads, so normed in a pre-norm model.
    """
    return _adapters(width, activation, scale, after, parallel=True)


def scaled_parallel(width: int = 64, activation: str = "relu", scale: float = 4.0, after: str = "mlp") -> Method:
    """Scaled parallel adapters, with the paper's scale of 4 (He et al. 2022, arXiv:2110.04366, section 4.6)."""
    return parallel(width, activation, scale, after)


def _adapters(
    width: int, activation: str, scale: float, after: str, parallel: bool, train: tuple[str, ...] = ()
) -> Method:
    targets.positive(width=width, scale=scale)
    if after not in PLACES:
        raise unknown("place in method.after", after, PLACES)
    options = {
        "adapter_width": width,
        "adapter_after": PLACES[after],
        "adapter_parallel": parallel,
        "adapter_activation": activation,
        "adapter_scale": scale,
    }
    return Method(model=options, train=(ADAPTERS, *train))
