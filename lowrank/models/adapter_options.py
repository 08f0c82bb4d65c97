"""The options that a fine-tuning run may add to any model, and the bottleneck adapter that one of them inserts.

Shapes: B rows, T tokens, D width, W bottleneck width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.weight import at_least_float32
from lowrank.models.layers import ACTIVATIONS, Linear

SUBLAYERS = ("attn", "mlp")
COUNTS = ("num_prompt", "prefix_length", "adapter_width", "routed_width", "routed_experts", "num_labels", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The options that a run sets beside a checkpoint's own; the defaults add nothing to the model."""

    num_prompt: int = 0  # virtual tokens before every sequence
    prefix_length: int = 0  # learned keys and values in every layer, before those of the sequence
    adapter_width: int = 0  # > 0: a bottleneck adapter of this width in every layer
    adapter_after: tuple[str, ...] = SUBLAYERS  # the sublayers that have an adapter
    adapter_parallel: bool = False  # the adapter reads the sublayer's input, not its output
    adapter_on_sum: bool = False  # the adapter reads the residual stream after the sublayer, not the sublayer's output
    adapter_activation: str = "gelu"
    adapter_scale: float = 1.0  # the factor of the adapter's output
    routed_width: int = 0  # > 0: low-rank experts of this width beside every mixture of experts
    routed_experts: int = 0  # their number, with a router of their own; 0: one beside each expert, with its gates
    routed_per_token: int = 1  # how many of the experts with a router of their own each token uses
    routed_scale: float = 1.0  # the factor of the low-rank experts' output
    context: int = 0  # > 0: the context in tokens, longer than the base's, to which rope is stretched
    rope: str = "yarn"  # how it is stretched, a key of context.STRETCHES
    context_theta: float = 0.0  # the theta of rope=abf
    position_factor: float = 1.0  # > 1: rope's positions are divided by it, and the context is as many times longer
    biases: bool = False  # a bias on every kernel of attention and MLP, zero where the checkpoint has none
    top_layers: int = 0  # how many of the last layers are a stack of their own; -k: all but the first k
    num_labels: int = 0  # > 0: a classifier with this many classes

    @property
    def max_length(self) -> int:
        """The context length in tokens: the number of positions that a row may have."""
        scaling = self.rope_scaling  # type: ignore[attr-defined]  # a model config's field
        own = max(self.max_positions, scaling.positions if scaling else 0)  # type: ignore[attr-defined]
        return self.context or int(own * self.position_factor)

    @property
    def num_virtual_tokens(self) -> int:
        """The number of positions before the first real token."""
        return self.num_prompt + self.prefix_length


def check_adapter_options(config: Any) -> None:
    """Raises UserError for options that the model of `config` cannot have."""
    for name in COUNTS:
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} is below 0: it must be 0 or more")
    if abs(config.top_layers) > config.layers:
        allowed = f"-{config.layers}..{config.layers}: the model has {plural(config.layers, 'layer')}"
        raise UserError(f"top_layers={config.top_layers} is not in {allowed}")
    if config.routed_width and not getattr(config, "experts", 0):
        raise UserError("routed_width needs a mixture of experts, and the model has none: set routed_width=0")
    if config.position_factor < 1:
        raise UserError(f"position_factor={config.position_factor} is below 1: it must be 1 or more")
    if config.routed_experts and not 1 <= config.routed_per_token <= config.routed_experts:
        allowed = f"1..{config.routed_experts}, the number of routed experts"
        raise UserError(f"routed_per_token={config.routed_per_token} is not in {allowed}")
    for name in config.adapter_after:
        if name not in SUBLAYERS:
            raise unknown("sublayer in adapter_after", name, SUBLAYERS)
    if config.adapter_parallel and config.adapter_on_sum:
        raise UserError("adapter_parallel and adapter_on_sum name two inputs of one adapter: set only one of them")
    if config.adapter_width and not config.adapter_after:
        raise UserError(f"adapter_after is empty, so that no layer has an adapter: name some of {', '.join(SUBLAYERS)}")
    if config.adapter_activation not in ACTIVATIONS:
        raise unknown("adapter_activation", config.adapter_activation, ACTIVATIONS)


class Bottleneck(nn.Module):
    """`scale * (act(x @ down + b) @ up + b')`, `up` and `b'` zero at first (Houlsby et al. 2019, arXiv:1902.00751)."""

    width: int
    activation: str
    scale: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """`[B, T, D] -> [B, T, D]`."""
        h_BxTxW = ACTIVATIONS[self.activation](Linear(self.width, True, DOWN_INIT, name="down")(x_BxTxD))
        y = Linear(x_BxTxD.shape[-1], True, nn.initializers.zeros, name="up")(h_BxTxW)
        return (at_least_float32(y) * self.scale).astype(y.dtype) if self.scale != 1 else y


DOWN_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as LoRA's A: within 1 / sqrt(D)


def add_sublayer(
    config: Any, sublayer: str, x_BxTxD: jax.Array, y_BxTxD: jax.Array, residual_sum: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The residual stream `[B, T, D]` after `sublayer`, whose adapter's output is added to `y` if it has one.

    `x` is the sublayer's input, `y` its output, and `residual_sum(y)` the residual stream with `y`, normed in a
    post-norm model. A sequential adapter reads `y`, or `residual_sum(y)` with `adapter_on_sum`; a parallel one reads
    `x` (He et al. 2022, arXiv:2110.04366). The caller is a compact module, of which the adapter becomes the child
    `attn_adapter` or `mlp_adapter`.
    """
    if not config.adapter_width or sublayer not in config.adapter_after:
        return residual_sum(y_BxTxD)
    name = f"{sublayer}_adapter"
    adapter = Bottleneck(config.adapter_width, config.adapter_activation, config.adapter_scale, name=name)
    sequential = residual_sum(y_BxTxD) if config.adapter_on_sum else y_BxTxD
    return residual_sum(y_BxTxD + adapter(x_BxTxD if config.adapter_parallel else sequential))
