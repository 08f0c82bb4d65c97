"""A model run one layer at a time: the input of its first layer, and one layer alone.

The models themselves stay as they are: an interceptor ends the forward pass of the model before its layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lowrank.core.typing import PyTree
from lowrank.models import build_block, build_model


@functools.partial(jax.jit, static_argnums=0)
def first_inputs(config: Any, params: PyTree, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, Any]:
    """`(residual stream [B, T, D], attention inputs)` of the first layer."""
    recorded: list[Any] = []

    def skip_stacks(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "_run_stacks":
            return call(*args, **kwargs)
        recorded.extend(args[:2])
        return args[0], {}

    with nn.intercept_methods(skip_stacks):
        build_model(config).apply({"params": params}, tokens, segments=segments, method="features")
    h_BxTxD, inputs = recorded
    return h_BxTxD, inputs


def call_layer(config: Any, layer: PyTree, h: jax.Array, inputs: Any, kind: Any) -> jax.Array:
    """The residual stream `[B, T, D]` after a layer, whose parameters have no layer axis; `kind` is its layer kind."""
    return build_block(config).apply({"params": layer}, h, inputs, kind)[0]


run_layer = jax.jit(call_layer, static_argnums=0)
