"""Learned keys and values that every token of a layer sees (Li & Liang 2021, arXiv:2101.00190).

Shapes: L layers, P prefix length, B rows, S keys, K key heads, H head width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.models.layers import kernel_init, stored

KeysValues = tuple[jax.Array, jax.Array]


class Prefix(nn.Module):
    """The prefixes of all layers: leaves `k` and `v` `[L, P, K * H]`. Keys are used as they are: no rope, no norm."""

    layers: int
    length: int
    kv_heads: int
    head_dim: int

    @nn.compact
    def __call__(self) -> KeysValues:
        """Keys and values `[L, P, K, H]`."""
        shape = (self.layers, self.length, self.kv_heads * self.head_dim)
        k, v = (stored(self, name, kernel_init, shape) for name in ("k", "v"))
        return k.reshape(*shape[:2], self.kv_heads, -1), v.reshape(*shape[:2], self.kv_heads, -1)


def before(prefix_PxKxH: jax.Array, x_BxSxKxH: jax.Array) -> jax.Array:
    """`[B, P + S, K, H]`: the prefix, then each row's own, in their dtype."""
    prefix_BxPxKxH = jnp.broadcast_to(prefix_PxKxH[None], (x_BxSxKxH.shape[0], *prefix_PxKxH.shape))
    return jnp.concatenate([prefix_BxPxKxH.astype(x_BxSxKxH.dtype), x_BxSxKxH], axis=1)
