"""The embedding tables that turn token ids into the first hidden state.

Shapes: B rows, T tokens, D width, V vocabulary, P positions.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lowrank.core import weight
from lowrank.models.layers import Norm, kernel_init, read_parameter


class Embeddings(nn.Module):
    """Token embeddings `[V, D]`; for models that have them, learned positions `[P, D]`, token types and a LayerNorm."""

    vocab_size: int
    width: int
    dtype: str
    scale: float = 1.0
    positions_size: int = 0
    types_size: int = 0
    norm_eps: float | None = None
    norm_bias: bool = True
    relative_size: int = 0

    def setup(self) -> None:
        """Reads the tables."""
        self.embedding = read_parameter(self, "embedding", kernel_init, (self.vocab_size, self.width))
        if self.positions_size:
            self.positions = read_parameter(self, "positions", kernel_init, (self.positions_size, self.width))
        if self.types_size:
            self.types = read_parameter(self, "types", kernel_init, (self.types_size, self.width))
        if self.relative_size:
            self.relative = read_parameter(self, "relative", kernel_init, (self.relative_size, self.width))
            self.relative_norm = Norm("layer", self.norm_eps or 1e-6)
        if self.norm_eps is not None:
            self.norm = Norm("layer", self.norm_eps, bias=self.norm_bias)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """`[B, T, D]` in the compute dtype."""
        h = weight.take(self.embedding, tokens_BxT).astype(self.dtype)
        return h * jnp.asarray(self.scale, h.dtype) if self.scale != 1 else h

    def add_positions(
        self, h_BxTxD: jax.Array, positions_BxT: jax.Array, types_BxT: jax.Array | None = None
    ) -> jax.Array:
        """Adds positions (`[1, T]` or `[B, T]`) and token types (None: all 0), then normalizes, as the model does."""
        if self.positions_size:
            h_BxTxD = self._add(h_BxTxD, self.positions, positions_BxT)
        if self.types_size:
            zeros = jnp.zeros((1, h_BxTxD.shape[1]), jnp.int32)
            h_BxTxD = self._add(h_BxTxD, self.types, zeros if types_BxT is None else types_BxT)
        return h_BxTxD if self.norm_eps is None else self.norm(h_BxTxD)

    def relative_positions(self) -> jax.Array:
        """The normalized embeddings of relative positions, `[1, R, D]` in the compute dtype."""
        return self.relative_norm(jnp.asarray(self.relative)[None].astype(self.dtype))

    def _add(self, h_BxTxD: jax.Array, table: jax.Array, ids_BxT: jax.Array) -> jax.Array:
        # Rounded after they are spread over the rows, whose gradients are then summed in the table's dtype.
        return h_BxTxD + jnp.broadcast_to(weight.take(table, ids_BxT), h_BxTxD.shape).astype(h_BxTxD.dtype)

    def to_logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """Logits float32 `[B, T, V]` of a model whose head is the embedding table."""
        return weight.dot_to_float32(h_BxTxD, self.embedding, 1)
