"""Layers stacked and scanned: one block is traced and compiled, whatever the depth."""

from typing import Any

import jax
from flax import linen as nn

from lowrank.errors import UserError, unknown

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
    """How many layers each stack has: the last `top_layers` are `top`, and a stack of none is left out."""
    sizes = {"layers": config.layers - config.top_layers, "top": config.top_layers}
    return {name: size for name, size in sizes.items() if size}


def check(config: Any) -> None:
    """Raises UserError for options that no model has."""
    if config.remat not in REMAT:
        raise unknown("remat policy", config.remat, REMAT)
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise unknown("compute dtype", config.dtype, ("float32", "bfloat16", "float16"))
    if not 0 <= config.top_layers <= config.layers:
        raise UserError(f"top_layers={config.top_layers} is not between 0 and the model's {config.layers} layers")
    for name in ("num_prompt", "num_labels"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} is below 0")
