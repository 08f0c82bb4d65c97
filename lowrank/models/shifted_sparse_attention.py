"""Shifted sparse attention: tokens see only their group, and half of the heads have groups shifted by half a group.

LongLoRA (Chen et al. 2024, arXiv:2309.12307) trains with it, at a cost linear in the length, and decodes with full
attention. The paper rolls the tokens; here the first and the last shifted group are half as long instead, as in the
authors' code with FlashAttention, so that the start of a row never sees its end.

Shapes: B rows, T tokens, N query heads, K key heads, H head width, G tokens per group, C groups per row.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank.kernels.attention.mask import Mask, Tokens

FILL = jnp.iinfo(jnp.int32).max  # the segment of the slots that fill up a row's first and last group


def attend_shifted(
    attend: Callable[..., jax.Array],
    q_BxTxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    mask: Mask,
    group: int,
) -> jax.Array:
    """`attend(q, k, v, mask)`, `[B, T, N, H]`, within groups of `group` tokens; the mask's slots are 0, 1, ....

    The first half of the heads has groups `[0, G), [G, 2G), ...`, the second half `[0, G/2), [G/2, 3G/2), ...`;
    the last group may be shorter.
    """
    N, K = q_BxTxNxH.shape[2], k_BxTxKxH.shape[2]
    if K % 2:  # key heads that cannot be halved are repeated for each of their query heads
        k_BxTxKxH, v_BxTxKxH = (jnp.repeat(x, N // K, axis=2) for x in (k_BxTxKxH, v_BxTxKxH))
        K = N
    halves = []
    for part, before in ((slice(None, N // 2), 0), (slice(N // 2, None), group // 2)):
        keys = slice(None, K // 2) if before == 0 else slice(K // 2, None)
        q, k, v = q_BxTxNxH[:, :, part], k_BxTxKxH[:, :, keys], v_BxTxKxH[:, :, keys]
        halves.append(_grouped(attend, q, k, v, mask, group, before))
    return jnp.concatenate(halves, axis=2)


def _grouped(attend, q, k, v, mask, G, before) -> jax.Array:
    """Attention within groups of G, the first of which lacks its first `before` tokens."""
    B, T = q.shape[:2]
    C = -(-(before + T) // G)

    def cut(x: jax.Array, fill: int = 0) -> jax.Array:
        pad = (before, C * G - before - T)
        x = jnp.pad(x, ((0, 0), pad, *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return x.reshape(-1, G, *x.shape[2:])

    def of_groups(tokens: Tokens) -> Tokens:
        segments = jnp.ones((B, T), jnp.int32) if tokens.segments is None else tokens.segments
        segments = jnp.broadcast_to(segments, (B, T))
        positions = None if tokens.positions is None else jnp.broadcast_to(tokens.positions, (B, T))
        return Tokens(cut(segments, FILL), None if positions is None else cut(positions))

    mask = dataclasses.replace(mask, queries=of_groups(mask.queries), keys=of_groups(mask.keys))
    out = attend(cut(q), cut(k), cut(v), mask)
    return out.reshape(B, C * G, *out.shape[2:])[:, before : before + T]
