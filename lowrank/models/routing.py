"""A layer's router, if it has one: what it makes of what enters the layer is handed to the layer's weights.

Shapes: B rows, T tokens, D width, K weights that are gated.
"""

from typing import Any

import jax
from flax import linen as nn

from lowrank.core import weight
from lowrank.core.weight import ROUTER


def gates(block: nn.Module, h_BxTxD: jax.Array, kept: jax.Array | None = None) -> jax.Array | None:
    """The gates `[B, T or 1, K]` of a layer that has a router, else None; `kept` are those of tokens before these."""
    if kept is not None or not block.has_variable("params", ROUTER):
        return kept
    return block.get_variable("params", ROUTER).gates(h_BxTxD)


def call(module: nn.Module, gates: jax.Array | None, *args: Any) -> Any:
    """`module(*args)` of a part of a layer, with the gates in its weights."""
    if gates is None:
        return module(*args)
    params = weight.with_gates(module.variables["params"], gates)
    return module.clone(parent=None, name=None).apply({"params": params}, *args)
