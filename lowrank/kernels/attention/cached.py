"""Attention of a few tokens to the slots of a key-value cache, which are read in place.

A loop takes `BLOCK` slots at a time, up to the longest row, and keeps the softmax's maximum and sum (Milakov and
Gimelshein 2018, arXiv:1805.02867). So nothing of the cache's size is copied or transposed in a step, and slots that no
row uses cost nothing. Keys and values are the left and right operands that XLA's products on a CPU read as they lie.

Shapes: L layers, B rows, T tokens, S slots, N query heads, K key heads, H head width, R = T * N / K queries a key head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 256  # slots


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys_LxBxKxSxH: jax.Array,
    values_LxBxKxSxH: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    local: jax.Array | None = None,
    prefix: int = 0,
) -> jax.Array:
    """`softmax(scale * q k) v`, `[B, T, N, H]`, over a row's first `lengths` slots and its tokens up to the query.

    `q` is `[B, T, N, H]`, and `k` and `v` `[B, T, K, H]` are those of the same tokens, which follow the slots. A
    `window` > 0 hides the slots that are that far before the query, but for the first `prefix`; `local`, a bool, says
    whether it applies (None: it does).
    """
    B, T, N, H = q.shape
    K, S = k.shape[2], keys_LxBxKxSxH.shape[3]
    q_BxKxRxH = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    times_BxT = lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    see = functools.partial(_seen, times_BxT, window=window, local=local, prefix=prefix)
    add = functools.partial(_add, q_BxKxRxH, H**-0.5 if scale is None else scale, softcap)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    own = add(_empty(q_BxKxRxH), k, v, see(times_BxT[:, :, None]))
    size = min(S, BLOCK)

    def add_block(i: jax.Array, total: Any) -> Any:
        start = jnp.minimum(i * size, S - size)  # the last block overlaps the one before
        read = lambda x: jax.lax.dynamic_slice(x, (layer, 0, 0, start, 0), (1, B, K, size, H))[0]  # noqa: E731
        slots_1xS = (start + jnp.arange(size, dtype=jnp.int32))[None]
        fresh_BxS = (slots_1xS >= i * size) & (slots_1xS < lengths_B[:, None])
        return add(total, read(keys_LxBxKxSxH), read(values_LxBxKxSxH), see(slots_1xS[:, :, None], fresh_BxS))

    _, weight_BxKxR, out_BxKxRxH = jax.lax.fori_loop(0, (jnp.max(lengths_B) + size - 1) // size, add_block, own)
    out = (out_BxKxRxH / weight_BxKxR[..., None]).reshape(B, K, N // K, T, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


def _seen(times_BxT, slots_BxSx1, valid_BxS=None, *, window, local, prefix):
    """Whether a query sees a slot, bools `[B, S, T]`."""
    times_Bx1xT = times_BxT[:, None]
    seen = slots_BxSx1 <= times_Bx1xT
    if valid_BxS is not None:
        seen &= valid_BxS[:, :, None]
    if window:
        near = (times_Bx1xT - slots_BxSx1 < window) | (slots_BxSx1 < prefix)
        seen &= near if local is None else near | ~local
    return seen


def _empty(q_BxKxRxH):
    """The largest score, the sum of the weights, and the weighted sum of the values, of no keys yet."""
    zeros = jnp.zeros(q_BxKxRxH.shape, jnp.float32)
    return jnp.full(q_BxKxRxH.shape[:3], -jnp.inf), zeros[..., 0], zeros


def _add(q_BxKxRxH, scale, softcap, total, k_BxKxSxH, v_BxKxSxH, seen_BxSxT):
    """`total` with more keys; the first ones must hold one that each query sees."""
    if q_BxKxRxH.dtype == jnp.float16:  # a CPU has no product of float16 to float32
        q_BxKxRxH, k_BxKxSxH, v_BxKxSxH = (x.astype(jnp.float32) for x in (q_BxKxRxH, k_BxKxSxH, v_BxKxSxH))
    top, weight, out = total
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    scores_BxKxSxR = product(k_BxKxSxH.astype(q_BxKxRxH.dtype), q_BxKxRxH, (((3,), (3,)), ((0, 1), (0, 1)))) * scale
    scores_BxKxSxR = softcap * jnp.tanh(scores_BxKxSxR / softcap) if softcap else scores_BxKxSxR
    groups = q_BxKxRxH.shape[2] // seen_BxSxT.shape[2]
    scores_BxKxSxR = jnp.where(jnp.tile(seen_BxSxT, (1, 1, groups))[:, None], scores_BxKxSxR, -jnp.inf)
    higher = jnp.maximum(top, jnp.max(scores_BxKxSxR, axis=2))
    probs_BxKxSxR, kept = jnp.exp(scores_BxKxSxR - higher[:, :, None]), jnp.exp(top - higher)
    v_BxKxSxH = v_BxKxSxH.astype(q_BxKxRxH.dtype)
    part = product(probs_BxKxSxR.astype(v_BxKxSxH.dtype), v_BxKxSxH, (((2,), (2,)), ((0, 1), (0, 1))))
    return higher, weight * kept + jnp.sum(probs_BxKxSxR, axis=2), out * kept[..., None] + part
