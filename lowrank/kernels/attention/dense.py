"""Attention that stores the scores of all pairs, `[B, N, T, S]`: the fastest form in plain JAX for short rows."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lowrank.kernels.attention.mask import Mask


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
    """`softmax(scale * q k) v`, `[B, T, N, H]`, with the softmax in float32.

    `implementation` is that of `jax.nn.dot_product_attention`, which does not compute a soft cap.
    """
    T, S = q.shape[1], k.shape[1]
    if softcap:
        return _softcapped(q, k, v, mask.expand(T, S)[:, None], scale, softcap)
    static = mask.is_static
    attend = functools.partial(
        jax.nn.dot_product_attention,
        mask=None if static else mask.expand(T, S)[:, None],
        scale=scale,
        is_causal=mask.causal and static,
        local_window_size=(mask.window - 1, 0 if mask.causal else mask.window - 1)
        if static and 0 < mask.window < S
        else None,
        implementation=implementation,
    )
    if q.dtype != jnp.float16 or implementation == "cudnn":
        return attend(q, k, v)
    wide = lambda *arrays: attend(*(x.astype(jnp.float32) for x in arrays)).astype(q.dtype)  # noqa: E731
    return jax.lax.platform_dependent(q, k, v, cpu=wide, default=attend)  # a CPU has no product of float16 to float32


def _softcapped(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_Bx1xTxS, scale, cap):
    B, T, N, H = q_BxTxNxH.shape
    K = k_BxSxKxH.shape[2]
    q = q_BxTxNxH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BxSxKxH, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scores * ((H**-0.5 if scale is None else scale) / cap))
    scores = jnp.where(mask_Bx1xTxS[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKxH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs, v_BxSxKxH).reshape(B, T, N, H)
