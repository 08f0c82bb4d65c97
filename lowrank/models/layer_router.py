"""A layer's router, if it has one: it computes gates from the layer's input, and the layer's weights use them.

Shapes: B rows, T tokens, D width, K gated weights.
"""

from typing import Any

import jax
from flax import linen as nn

from lowrank.core import weight
from lowrank.core.weight import ROUTER


def layer_gates(block: nn.Module, h_BxTxD: jax.Array, cached: jax.Array | None = None) -> jax.Array | None:
    """The gates `[B, T or 1, K]` of a layer that has a router, else None; `cached` gates are reused."""
    if cached is not None or not block.has_variable("params", ROUTER):
        return cached
    router: Any = block.get_variable("params", ROUTER)
    return router.gates(h_BxTxD)


def apply_with_gates(module: nn.Module, gates: jax.Array | None, *args: Any) -> Any:
    """`module(*args)` of a layer's child module, with the gates in its weights."""
    if gates is None:
        return module(*args)  # type: ignore[operator]  # a Linen module is callable
    params = weight.with_gates(module.variables["params"], gates)
    return module.clone(parent=None, name=None).apply({"params": params}, *args)
