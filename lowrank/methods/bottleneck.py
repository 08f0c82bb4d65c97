"""Bottleneck adapters: two small layers inside every block, `y + scale * up(act(down(x)))`, with up = 0 at first.

`down` is `[D, width]`, `up` `[width, D]`, both with a bias: 2 D width + width + D parameters per adapter. The
output of an adapter is added to the output of its sublayer, before the residual sum (and before a post-norm). The model
is unchanged at attach. `activation` is a name of `lowrank.models.layers.ACTIVATIONS`.
"""

from lowrank.core.errors import unknown
from lowrank.methods import targets
from lowrank.methods.method import Method

ADAPTERS = r"(layers|top)/(attn|mlp)_adapter/.*"
PLACES = {"both": ("attn", "mlp"), "attn": ("attn",), "mlp": ("mlp",)}


def bottleneck_method(
    width: int,
    activation: str,
    scale: float,
    after: str,
    *,
    parallel: bool = False,
    on_sum: bool = False,
    trainable: tuple[str, ...] = (),
) -> Method:
    """Adapters of `width` that read the outputs of sublayers, their inputs (`parallel`), or the sums after them.

    `trainable` adds trained leaves.
    """
    targets.check_positive(width=width, scale=scale)
    if after not in PLACES:
        raise unknown("place in method.after", after, PLACES)
    options = {
        "adapter_width": width,
        "adapter_after": PLACES[after],
        "adapter_parallel": parallel,
        "adapter_on_sum": on_sum,
        "adapter_activation": activation,
        "adapter_scale": scale,
    }
    return Method(model_options=options, trainable=(ADAPTERS, *trainable))
