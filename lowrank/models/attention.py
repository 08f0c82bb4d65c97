"""Grouped-query attention: the projections, and the product through `jax.nn.dot_product_attention`.

Shapes: B rows, T queries, S keys, N query heads, K key heads, H head width, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lowrank.models import rope
from lowrank.models.attention_masks import AttentionInputs
from lowrank.models.kv_cache import update_slots
from lowrank.models.layers import Linear, Norm
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
    causal: bool = False  # used where the inputs have no mask
    window: int = 0  # used where the inputs have no mask
    scale: float | None = None
    softcap: float = 0.0
    fused: bool = True  # cuDNN's kernel where it accepts the shapes
    shift_group: int = 0  # > 0: shifted sparse attention in groups of this many tokens, except with a cache
    clip: float = 0.0  # > 0: queries, keys and values are clipped to -clip..clip before rope

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        inputs: AttentionInputs,
        past: KeysValues | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """`[B, T, D]`, and the keys and values of these tokens if they are written into a cache, else None.

        `past` are keys and values: with an `index`, the slots `[B, S, K, H]` of a cache, in which the new keys and
        values are written from `index` on; without one, a prefix `[P, K, H]` before the keys of every row.
        """
        q, k, v = self._project(x_BxTxD)
        if inputs.cos is not None and inputs.sin is not None:
            q, k = rope.apply_rope(q, inputs.cos, inputs.sin), rope.apply_rope(k, inputs.cos, inputs.sin)
        q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), ("query", "key", "value"), strict=True))
        new = None
        if index is not None:
            assert past is not None  # a cache has slots
            new = k, v
            k, v = (update_slots(slots, x, index, axis=1).astype(q.dtype) for slots, x in zip(past, new, strict=True))
        elif past is not None:
            k, v = (prepend_prefix(prefix, x) for prefix, x in zip(past, (k, v), strict=True))
        options = {name: getattr(self, name) for name in ("causal", "window", "scale", "softcap", "fused")}
        if self.shift_group and index is None:
            out = attend_shifted(attend, q, k, v, inputs.mask_Bx1xTxS, group=self.shift_group, **options)
        else:
            out = attend(q, k, v, inputs.mask_Bx1xTxS, **options)
        out = checkpoint_name(out.reshape(*out.shape[:2], self.heads * self.head_dim), "context")
        return Linear(x_BxTxD.shape[-1], self.o_bias, name="o")(out), new

    def _project(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        if self.fused_qkv:
            q, k, v = jnp.split(
                Linear(sum(widths), self.qkv_bias, name="qkv")(x_BxTxD), (widths[0], sum(widths[:2])), axis=-1
            )
        else:
            q, k, v = (Linear(w, self.qkv_bias, name=n)(x_BxTxD) for n, w in zip("qkv", widths, strict=True))
        if self.wide_qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        if self.clip:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        return q, k, v

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return Norm("rms", self.norm_eps, self.norm_offset, name=name)(x)


def attend(
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    mask_Bx1xTxS: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    fused: bool = True,
) -> jax.Array:
    """`softmax(scale * q k) v`, `[B, T, N, H]`; the softmax in float32. `fused`: by cuDNN where `cudnn_fits`.

    With a mask, `causal` and `window` are ignored; without one they apply (a token sees itself and the window - 1
    tokens before it; 0: no window). `softcap` maps a score to `cap * tanh(score / cap)` and needs a mask.
    """
    if softcap:
        return _softcapped(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_Bx1xTxS, scale, softcap)
    static = mask_Bx1xTxS is None
    return jax.nn.dot_product_attention(
        q_BxTxNxH,
        k_BxSxKxH,
        v_BxSxKxH,
        mask=mask_Bx1xTxS,
        scale=scale,
        is_causal=causal and static,
        local_window_size=(window - 1, 0) if static and 0 < window < k_BxSxKxH.shape[1] else None,
        implementation="cudnn" if fused and cudnn_fits(q_BxTxNxH, k_BxSxKxH.shape[1], jax.devices()[0]) else "xla",
    )


def cudnn_fits(q_BxTxNxH: Any, keys: int, device: Any) -> bool:
    """Whether cuDNN's fused attention takes these queries (shape and dtype) and `keys` keys on `device`.

    It needs half precision, even lengths, heads of a multiple of 8 up to 128 (256 from Hopper on), Ampere or later.
    """
    _, T, _, H = q_BxTxNxH.shape
    nvidia = device.platform == "gpu" and "NVIDIA" in device.device_kind
    if not nvidia or q_BxTxNxH.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = float(device.compute_capability)
    return capability >= 8 and H % 8 == 0 and (256 if capability >= 9 else 128) >= H and T % 2 == keys % 2 == 0


def _softcapped(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_Bx1xTxS, scale, cap):
    B, T, N, H = q_BxTxNxH.shape
    K = k_BxSxKxH.shape[2]
    q = q_BxTxNxH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BxSxKxH, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scores * ((H**-0.5 if scale is None else scale) / cap))
    scores = jnp.where(mask_Bx1xTxS[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKxH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs, v_BxSxKxH).reshape(B, T, N, H)
