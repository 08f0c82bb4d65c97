"""The product in plain JAX, one tree of selections for the whole kernel: the reference of the other bodies."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def multiply(x: jax.Array, codes: jax.Array, scale: jax.Array, *, levels: Sequence[float], block: int) -> jax.Array:
    """`x @ (levels[code] * scale)`; products are summed in float32."""
    w = decode(codes, scale, levels, block)[: x.shape[1]].astype(x.dtype)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def decode(codes: jax.Array, scale: jax.Array, levels: Sequence[float], block: int) -> jax.Array:
    """The kernel `[rows of the codes and their padding, out]` in float32."""
    halves = codes.reshape(-1, block // 2, codes.shape[1])
    parts = jnp.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=1)
    values = jnp.take(jnp.asarray(levels, jnp.float32), parts.astype(jnp.int32), axis=0)
    return (values * jnp.broadcast_to(scale[:, None, :], values.shape)).reshape(-1, codes.shape[1])
