"""Layers stacked and scanned: one block is traced and compiled, whatever the depth."""

from typing import Any

import jax
from flax import linen as nn

from lowrank.errors import unknown
from lowrank.models import additions

# What the backward pass finds saved: everything; the input of each block; also the outputs of its matrix products.
REMAT = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(block: type[nn.Module], config: Any, length: int) -> nn.Module:
    """`length` blocks with parameters stacked on axis 0, called as `(h, view, kinds, past, index) -> (h, new)`.

    `kinds` and `past` (and `new`) have a layer axis first, or are None.
    """
    if config.remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT[config.remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0, 0, nn.broadcast),
        length=length,
        unroll=config.unroll,
    )(config)


def depths(config: Any) -> dict[str, int]:
    """How many layers each stack has: the last `top_layers` (-k: all but the first k) are `top`; none are left out."""
    top = config.top_layers + (config.layers if config.top_layers < 0 else 0)
    sizes = {"layers": config.layers - top, "top": top}
    return {name: size for name, size in sizes.items() if size}


def by_stack(config: Any, per_layer: Any) -> dict[str, Any]:
    """Arrays `[layers, ...]` cut into those of each stack."""
    cuts, first = {}, 0
    for name, depth in depths(config).items():
        cuts[name] = jax.tree.map(lambda x, i=first, n=depth: x[i : i + n], per_layer)
        first += depth
    return cuts


def check(config: Any) -> None:
    """Raises UserError for options that no model has."""
    if config.remat not in REMAT:
        raise unknown("remat policy", config.remat, REMAT)
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise unknown("compute dtype", config.dtype, ("float32", "bfloat16", "float16"))
    additions.check(config)
