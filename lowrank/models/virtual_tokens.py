"""The learned positions before a sequence: embeddings at the input (Prompt), or keys and values per layer (Prefix).

Shapes: L layers, P prefix length, B rows, T tokens, S keys, D width, K key heads, H head width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.models.layers import kernel_init, read_parameter

KeysValues = tuple[jax.Array, jax.Array]


class Prompt(nn.Module):
    """Virtual tokens, learned in place of text (Lester et al. 2021, arXiv:2104.08691).

    They are embeddings: `scale` is the factor that the model applies to its token embeddings.
    """

    length: int
    width: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, h_BxTxD: jax.Array) -> jax.Array:
        """`[B, length + T, D]`: the virtual tokens, then `h`."""
        table = read_parameter(self, "embedding", kernel_init, (self.length, self.width))
        # Rounded after it is spread over the rows, whose gradients are then summed in the table's dtype.
        rows = jnp.broadcast_to(table[None], (h_BxTxD.shape[0], *table.shape)).astype(h_BxTxD.dtype)
        rows = rows * jnp.asarray(self.scale, rows.dtype) if self.scale != 1 else rows
        return jnp.concatenate([rows, h_BxTxD], axis=1)


class Prefix(nn.Module):
    """Learned keys and values of all layers (Li & Liang 2021, arXiv:2101.00190): leaves `k` and `v` `[L, P, K * H]`.

    Every token of a layer sees them. The keys are used as they are stored: without rope and without a norm.
    """

    layers: int
    length: int
    kv_heads: int
    head_dim: int

    @nn.compact
    def __call__(self) -> KeysValues:
        """Keys and values `[L, P, K, H]`."""
        shape = (self.layers, self.length, self.kv_heads * self.head_dim)
        k, v = (read_parameter(self, name, kernel_init, shape) for name in ("k", "v"))
        return k.reshape(*shape[:2], self.kv_heads, -1), v.reshape(*shape[:2], self.kv_heads, -1)


def prepend_prefix(prefix_PxKxH: jax.Array, x_BxSxKxH: jax.Array) -> jax.Array:
    """`[B, P + S, K, H]` in the dtype of `x`: the prefix, then each row's own keys or values."""
    prefix_BxPxKxH = jnp.broadcast_to(prefix_PxKxH[None], (x_BxSxKxH.shape[0], *prefix_PxKxH.shape))
    return jnp.concatenate([prefix_BxPxKxH.astype(x_BxSxKxH.dtype), x_BxSxKxH], axis=1)
