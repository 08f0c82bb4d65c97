"""From features to logits that are float32 whatever the compute dtype, at the price of a product in that dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank import weight
from lowrank.models.layers import HALF, kernel_init, stored


class Readout(nn.Module):
    """`x @ kernel`, accumulated and returned in float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in] -> [..., features]`."""
        return readout(x, stored(self, "kernel", kernel_init, (x.shape[-1], self.features)), 0)


def readout(x: jax.Array, w: Any, axis: int) -> jax.Array:
    """`x` `[..., D]` times `w` over the axis of `w` that is D: 0 for a head `[D, V]`, 1 for an embedding `[V, D]`.

    Float32 `[..., V]`. In half precision nothing is rounded on the way out, and on the way back the gradient of the
    logits is rounded before it is multiplied, so that every product is one of half precision.
    """
    if weight.is_weight(w) and axis == 0:
        return weight.dot(x, w).astype(jnp.float32)
    w = weight.materialize(w)
    return (_rounded_backward if x.dtype in HALF else _product)(x, w, axis)


def _product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=jnp.float32)


_rounded_backward = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _forward(x: jax.Array, w: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, w, axis), (x, w)


def _backward(axis: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    g = g.astype(x.dtype)
    dx = weight.dot(g, w if axis == 1 else w.T)
    rows = tuple(range(x.ndim - 1))
    pair = (x, g) if axis == 0 else (g, x)
    dw = jax.lax.dot_general(*pair, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


_rounded_backward.defvjp(_forward, _backward)
