"""Layers stacked and scanned: one block is traced and compiled, whatever the depth."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lowrank.core.errors import UserError, unknown
from lowrank.core.weight import PRODUCT
from lowrank.models import adapter_options
from lowrank.models.layers import NAMES

policies = jax.checkpoint_policies
# What the backward pass finds saved of each block, beside its input; it computes the rest again.
REMAT: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "none": lambda names: policies.everything_saveable,
    "full": lambda names: policies.nothing_saveable,
    "dots": lambda names: policies.save_only_these_names(PRODUCT),
    "dots_all": lambda names: policies.save_from_both_policies(  # attention's products of activations too
        policies.dots_saveable, policies.save_only_these_names(PRODUCT)
    ),
    "names": lambda names: policies.save_only_these_names(*names),
    "offload": lambda names: policies.save_and_offload_only_these_names(  # in the host's memory, the input too if named
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
NAMED = {"names": ("query", "key", "value", "context"), "offload": ("input",)}  # unless `remat_names` says so


def stack(block: type[nn.Module], config: Any, length: int) -> nn.Module:
    """`length` blocks with parameters stacked on axis 0, called as `(h, view, kinds, past, index) -> (h, new)`.

    `kinds` and `past` (and `new`) have a layer axis first, or are None.
    """
    if config.remat != "none":
        names = config.remat_names or NAMED.get(config.remat, ())
        block = nn.remat(block, prevent_cse=False, policy=REMAT[config.remat](names))
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
    for name in config.remat_names:
        if name not in NAMES:
            raise unknown("activation in remat_names", name, NAMES)
    if config.remat_names and config.remat not in NAMED:
        raise UserError(f"remat_names go with remat=names or remat=offload, not with remat={config.remat}")
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise unknown("compute dtype", config.dtype, ("float32", "bfloat16", "float16"))
    adapter_options.check(config)
