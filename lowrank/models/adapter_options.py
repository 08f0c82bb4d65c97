"""What a fine-tuning run may add to any model: options that both configs share, and the bottleneck adapter.

Shapes: B rows, T tokens, D width, W bottleneck width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.core.errors import UserError, unknown
from lowrank.models.layers import ACTIVATIONS, Linear

SUBLAYERS = ("attn", "mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Options that a run sets on top of a checkpoint's own; the defaults add nothing."""

    num_prompt: int = 0  # virtual tokens before every sequence
    prefix_length: int = 0  # learned keys and values in every layer, before those of the sequence
    adapter_width: int = 0  # > 0: bottleneck adapters of that width in every layer
    adapter_after: tuple[str, ...] = SUBLAYERS  # the sublayers that have one
    adapter_parallel: bool = False  # reads the sublayer's input, not its output
    adapter_activation: str = "gelu"
    adapter_scale: float = 1.0  # of what an adapter adds
    routed_width: int = 0  # > 0: low-rank experts of that width beside every mixture of experts
    routed_experts: int = 0  # how many, with a router of their own; 0: one beside each expert, and its gates
    routed_per_token: int = 1  # of those with a router of their own
    routed_scale: float = 1.0  # of what they add
    position_factor: float = 1.0  # > 1: rope's positions are divided by it, and so many times as many fit
    biases: bool = False  # on every kernel of attention and MLP, zero where the checkpoint has none
    top_layers: int = 0  # how many of the last layers are a stack of their own; -k: all but the first k
    num_labels: int = 0  # > 0: a classifier

    @property
    def max_length(self) -> int:
        """How many positions a row may have."""
        return int(self.max_positions * self.position_factor)

    @property
    def num_virtual_tokens(self) -> int:
        """How many positions stand before the first real token."""
        return self.num_prompt + self.prefix_length


def check(config: Any) -> None:
    """Raises UserError for additions that no model can have."""
    for name in ("num_prompt", "prefix_length", "adapter_width", "routed_width", "routed_experts", "num_labels"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} is below 0")
    if abs(config.top_layers) > config.layers:
        raise UserError(f"top_layers={config.top_layers} is not between 0 and the model's {config.layers} layers")
    if config.routed_width and not getattr(config, "experts", 0):
        raise UserError("routed_width: the model has no mixture of experts that routed modules could stand beside")
    if config.position_factor < 1:
        raise UserError(f"position_factor={config.position_factor} is below 1")
    if config.position_factor > 1 and getattr(config, "learned_positions", True):
        raise UserError(f"position_factor={config.position_factor}: the model has no rope whose positions it divides")
    if config.routed_experts and not 1 <= config.routed_per_token <= config.routed_experts:
        raise UserError(f"routed_per_token={config.routed_per_token} is not in 1..{config.routed_experts}")
    for name in config.adapter_after:
        if name not in SUBLAYERS:
            raise unknown("sublayer in adapter_after", name, SUBLAYERS)
    if config.adapter_width and not config.adapter_after:
        raise UserError("adapter_after is empty: no layer has an adapter")
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
        return y * jnp.asarray(self.scale, y.dtype) if self.scale != 1 else y


DOWN_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as LoRA's A: within 1 / sqrt(D)


def add_adapter(config: Any, sublayer: str, x_BxTxD: jax.Array, y_BxTxD: jax.Array) -> jax.Array:
    """What `sublayer`, which made `y` out of `x`, adds to the stream: `y`, plus what its adapter makes of `x` or `y`.

    Sequential (after the sublayer, before the residual sum) or parallel (He et al. 2022, arXiv:2110.04366). To be
    called within a compact module: the adapter is its child `attn_adapter` or `mlp_adapter`.
    """
    if not config.adapter_width or sublayer not in config.adapter_after:
        return y_BxTxD
    adapter = Bottleneck(
        config.adapter_width, config.adapter_activation, config.adapter_scale, name=f"{sublayer}_adapter"
    )
    return y_BxTxD + adapter(x_BxTxD if config.adapter_parallel else y_BxTxD)
