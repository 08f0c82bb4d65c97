"""The stacks of layers: parameters have a layer axis, and a scan traces and compiles one block, whatever the depth."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lowrank.core.errors import UserError, unknown
from lowrank.core.weight import PRODUCT
from lowrank.kernels.attention.dispatch import IMPLEMENTATIONS
from lowrank.models.adapter_options import check_adapter_options
from lowrank.models.layers import SAVEABLE

policies = jax.checkpoint_policies
# The residuals that the forward pass saves of each block beside its input; the backward pass recomputes the others.
REMAT: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "none": lambda names: policies.everything_saveable,
    "full": lambda names: policies.nothing_saveable,
    "dots": lambda names: policies.save_only_these_names(PRODUCT),
    "dots_all": lambda names: policies.save_from_both_policies(  # the products of activations in attention too
        policies.dots_saveable, policies.save_only_these_names(PRODUCT)
    ),
    "names": lambda names: policies.save_only_these_names(*names),
    "offload": lambda names: policies.save_and_offload_only_these_names(  # into the host's memory; `input` too if named
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
DEFAULT_NAMES = {"names": ("query", "key", "value", "context"), "offload": ("input",)}  # where `remat_names` is empty
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def scan_layers(block: type[nn.Module], config: Any, length: int) -> nn.Module:
    """`length` blocks with parameters stacked on axis 0, called as `(h, inputs, kind, past, slots) -> (h, new)`.

    `kind`, `past` and `new` have a layer axis first, or are None.
    """
    if config.remat != "none":
        names = config.remat_names or DEFAULT_NAMES.get(config.remat, ())
        block = nn.remat(block, prevent_cse=False, policy=REMAT[config.remat](names))
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0, 0, nn.broadcast),
        length=length,
        unroll=config.unroll,
    )(config)


def stack_depths(config: Any) -> dict[str, int]:
    """The number of layers of each stack: `top` has the last `top_layers` (-k: all but the first k), `layers` the rest.

    An empty stack is left out.
    """
    top = config.top_layers + (config.layers if config.top_layers < 0 else 0)
    sizes = {"layers": config.layers - top, "top": top}
    return {name: size for name, size in sizes.items() if size}


def split_by_stack(config: Any, per_layer: Any) -> dict[str, Any]:
    """Arrays `[layers, ...]` cut into the part `[depth, ...]` of each stack."""
    parts, first = {}, 0
    for name, depth in stack_depths(config).items():
        parts[name] = jax.tree.map(lambda x, i=first, n=depth: x[i : i + n], per_layer)
        first += depth
    return parts


def check_model_options(config: Any) -> None:
    """Raises UserError for values of options that no model accepts."""
    if config.remat not in REMAT:
        raise unknown("remat policy", config.remat, REMAT)
    for name in config.remat_names:
        if name not in SAVEABLE:
            raise unknown("activation in remat_names", name, SAVEABLE)
    if config.remat_names and config.remat not in DEFAULT_NAMES:
        raise UserError(f"remat_names needs remat=names or remat=offload, and the config has remat={config.remat}")
    if config.attention not in IMPLEMENTATIONS:
        raise unknown("form in model.attention", config.attention, IMPLEMENTATIONS)
    if config.dtype not in COMPUTE_DTYPES:
        raise unknown("compute dtype", config.dtype, COMPUTE_DTYPES)
    check_adapter_options(config)
