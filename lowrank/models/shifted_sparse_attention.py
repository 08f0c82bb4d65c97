"""Shifted sparse attention: tokens see only their group, and half of the heads have groups shifted by half a group.

LongLoRA (Chen et al. 2024, arXiv:2309.12307) trains with it, at a cost linear in the length, and decodes with full
attention. The paper rolls the tokens; here the first and the last shifted group are half as long instead, so that the
end of a row never sees its start.

Shapes: B rows, T tokens, N query heads, K key heads, H head width, G tokens per group, C groups per row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def attend_shifted(
    attend: Callable[..., jax.Array],
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    mask_Bx1xTxT: jax.Array | None = None,
    *,
    group: int,
    causal: bool = False,
    window: int = 0,
    **options: Any,
) -> jax.Array:
    """`attend(q, k, v, mask, **options)`, `[B, T, N, H]`, within groups of `group` tokens.

    The first half of the heads has groups `[0, G), [G, 2G), ...`, the second half `[0, G/2), [G/2, 3G/2), ...`;
    the last group may be shorter. Without a mask `causal` and `window` apply, as in `attention.attend`.
    """
    N, K = q_BxTxNxH.shape[2], k_BxTxKxH.shape[2]
    if K % 2:  # key heads that cannot be halved are repeated for each of their query heads
        k_BxTxKxH, v_BxTxKxH = (jnp.repeat(x, N // K, axis=2) for x in (k_BxTxKxH, v_BxTxKxH))
        K = N
    if mask_Bx1xTxT is None:
        mask_Bx1xTxT = _static(q_BxTxNxH.shape[1], causal, window)
    halves = []
    for part, before in ((slice(None, N // 2), 0), (slice(N // 2, None), group // 2)):
        keys = slice(None, K // 2) if before == 0 else slice(K // 2, None)
        q, k, v = q_BxTxNxH[:, :, part], k_BxTxKxH[:, :, keys], v_BxTxKxH[:, :, keys]
        halves.append(_grouped(attend, q, k, v, mask_Bx1xTxT, group, before, options))
    return jnp.concatenate(halves, axis=2)


def _static(T: int, causal: bool, window: int) -> jax.Array:
    back_TxT = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    seen_TxT = (back_TxT >= 0) if causal else jnp.ones((T, T), bool)
    return (seen_TxT & (back_TxT < window) if window else seen_TxT)[None, None]


def _grouped(attend, q, k, v, mask_Bx1xTxT, G, before, options) -> jax.Array:
    """Attention within groups of G, the first of which lacks its first `before` tokens."""
    B, T = q.shape[:2]
    C = -(-(before + T) // G)
    pad = (before, C * G - before - T)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), pad, (0, 0), (0, 0))).reshape(B * C, G, *x.shape[2:])

    out = attend(cut(q), cut(k), cut(v), _blocks(mask_Bx1xTxT, B, C, G, pad), **options)
    return out.reshape(B, C * G, *out.shape[2:])[:, before : before + T]


def _blocks(mask_Bx1xTxT: jax.Array, B: int, C: int, G: int, pad: tuple[int, int]) -> jax.Array:
    """The mask's diagonal blocks, `[B * C, 1, G, G]`. Padding sees itself, so that no softmax is empty."""
    rows = mask_Bx1xTxT.shape[0]
    padded = jnp.pad(mask_Bx1xTxT[:, 0], ((0, 0), pad, pad)).reshape(rows, C, G, C, G)
    groups_C = jnp.arange(C)
    blocks_CxBxGxG = padded[:, groups_C, :, groups_C, :] | jnp.eye(G, dtype=bool)[None, None]
    return jnp.broadcast_to(jnp.moveaxis(blocks_CxBxGxG, 0, 1), (B, C, G, G)).reshape(B * C, 1, G, G)
