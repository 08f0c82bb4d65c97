"""Grouped-query attention: the projections, and the product through `lowrank.kernels.attention`.

Shapes: B rows, T queries, S keys, N query heads, K key heads, H head width, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lowrank.kernels.attention import cached, dispatch
from lowrank.kernels.attention.mask import Mask
from lowrank.models import rope
from lowrank.models.attention_masks import AttentionInputs
from lowrank.models.kv_cache import NOTHING, Past, Slots
from lowrank.models.layers import Linear, Norm
from lowrank.models.relative_attention import attend_relative
from lowrank.models.shifted_sparse_attention import attend_shifted
from lowrank.models.virtual_tokens import KeysValues, prepend_prefix


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245), optionally with qk-norm and soft cap."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    fused_qkv: bool = False  # one kernel `qkv` instead of three kernels
    qk_norm: bool = False
    wide_qk_norm: bool = False  # one norm over all heads, not one per head
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    scale: float | None = None
    softcap: float = 0.0
    form: str = "auto"  # of dispatch.IMPLEMENTATIONS, except with a cache, where it is auto
    shift_group: int = 0  # > 0: shifted sparse attention in groups of this many tokens, except with a cache
    prefix_length: int = 0  # the slots of a cache that hold a prefix, which a window does not hide
    clip: float = 0.0  # > 0: queries, keys and values are clipped to -clip..clip before rope
    relative: tuple[int, int] | None = None  # the buckets and the distance of disentangled attention
    by_head: bool = False  # the outputs of `qkv` are each head's query, key and value in turn

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        inputs: AttentionInputs,
        past: Past = NOTHING,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """`[B, T, D]`, and the keys and values `[B, T, K, H]` of these tokens if there are `slots` for them, else None.

        The tokens see those in the slots, or the prefix of `past`, and each other.
        """
        q, k, v, positions = self._project(x_BxTxD, inputs.relative)
        if inputs.cos is not None and inputs.sin is not None:
            q, k = rope.apply_rope(q, inputs.cos, inputs.sin), rope.apply_rope(k, inputs.cos, inputs.sin)
        q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), ("query", "key", "value"), strict=True))
        if past.prefix is not None:
            k, v = (prepend_prefix(prefix, x) for prefix, x in zip(past.prefix, (k, v), strict=True))
        if self.relative is not None:
            assert positions is not None
            out = attend_relative(q, k, v, positions, inputs.mask, *self.relative)
        else:
            out = self._attend(q, k, v, inputs.mask, past, slots)
        new = None if slots is None else (k, v)
        out = checkpoint_name(out.reshape(*out.shape[:2], self.heads * self.head_dim), "context")
        return Linear(x_BxTxD.shape[-1], self.o_bias, name="o")(out), new

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, past: Past, slots: Slots | None
    ) -> jax.Array:
        if slots is not None and slots.keys is not None:
            return cached.attend(
                q,
                k,
                v,
                slots.keys,
                slots.values,
                past.layer,
                slots.index_B,
                scale=self.scale,
                softcap=self.softcap,
                window=mask.window,
                local=mask.local,
                prefix=self.prefix_length,
            )
        form = self.form if slots is None else "auto"
        attend = functools.partial(dispatch.attend, scale=self.scale, softcap=self.softcap, implementation=form)
        if self.shift_group and slots is None:
            return attend_shifted(attend, q, k, v, mask, self.shift_group)
        return attend(q, k, v, mask)

    def _project(
        self, x_BxTxD: jax.Array, relative_1xRxD: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, KeysValues | None]:
        """Queries, keys and values, and the queries and keys `[1, R, N, H]` of relative positions."""
        positions: Any = None
        widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        if self.fused_qkv:
            y = Linear(sum(widths), self.qkv_bias, name="qkv")(x_BxTxD)
            if self.by_head:
                y = y.reshape(*y.shape[:2], self.heads, 3, self.head_dim).swapaxes(2, 3).reshape(y.shape)
            q, k, v = jnp.split(y, (widths[0], sum(widths[:2])), axis=-1)
        else:
            kernels = [Linear(w, self.qkv_bias, name=n) for n, w in zip("qkv", widths, strict=True)]
            q, k, v = (kernel(x_BxTxD) for kernel in kernels)
            if relative_1xRxD is not None:
                projected = (kernel(relative_1xRxD) for kernel in kernels[:2])
                positions = tuple(y.reshape(*y.shape[:2], -1, self.head_dim) for y in projected)
        if self.wide_qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if self.clip:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        return q, k, v, positions

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return Norm("rms", self.norm_eps, self.norm_offset, name=name)(x)
