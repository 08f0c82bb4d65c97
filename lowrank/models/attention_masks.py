"""Who sees whom, and where: masks and positions from segments, before any layer runs.

Shapes: B rows, T tokens (virtual ones first), S keys.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.models import cache as caches
from lowrank.models import rope
from lowrank.models.cache import Cache

EVERY = -1  # the segment of virtual prompt tokens: all segments see them
PREFIX = -2  # that of a prefix's keys: all segments see them, from however far


class AttentionInputs(NamedTuple):
    """What a layer sees: rope tables `[B, T, 1, H/2]` (None: no rope), a mask `[B, 1, T, S]` (None: all, or causal)."""

    cos: jax.Array | None = None
    sin: jax.Array | None = None
    mask_Bx1xTxS: jax.Array | None = None


def with_prompt(segments_BxT: jax.Array, virtual: int) -> jax.Array:
    """The segments, with `virtual` tokens in front that all segments see."""
    return jnp.pad(segments_BxT, ((0, 0), (virtual, 0)), constant_values=EVERY)


def with_prefix(segments_BxT: jax.Array, length: int) -> jax.Array:
    """The segments of the keys of tokens with these segments, when a prefix of `length` stands before them."""
    return jnp.pad(segments_BxT, ((0, 0), (length, 0)), constant_values=PREFIX)


def seen(q_segments_BxT: jax.Array, k_segments_BxS: jax.Array) -> jax.Array:
    """`[B, T, S]` bool: whether query and key are of one segment, or the key belongs to all."""
    k_Bx1xS = k_segments_BxS[:, None, :]
    return (q_segments_BxT[:, :, None] == k_Bx1xS) | (k_Bx1xS < 0)


def causal(
    config: Any,
    batch: int,
    length: int,
    virtual: int,
    positions: jax.Array | None,
    segments: jax.Array | None,
    cache: Cache | None,
) -> tuple[jax.Array, AttentionInputs, Cache | None]:
    """`(positions [B, T], view, cache)` of `length` tokens, the first `virtual` of them virtual.

    The keys are theirs behind the model's prefix, or the slots of the cache, which already has the prefix in it.
    `positions` and `segments` speak of the others, or are None. A cache comes back with these tokens marked in it. With
    neither segments nor a cache the view has no mask: attention itself knows how to be causal.
    """
    if segments is None and cache is None and not config.needs_mask:
        positions = _positions(positions, virtual, config.num_virtual_tokens, jnp.arange(length)[None, :])
        return positions, _layer_views(config, positions, positions, None, None), None
    if segments is None:
        segments = jnp.ones((1 if cache is None else batch, length - virtual), jnp.int32)
    segments = with_prompt(segments, virtual)
    k_segments, start = with_prefix(segments, config.prefix_length), config.prefix_length
    if cache is not None:
        start = cache.index
        k_segments = caches.put(cache.segments_BxS, segments, start, axis=1)
    seen_BxTxS = seen(segments, k_segments) & _causal(length, k_segments.shape[1], start)[None]
    counted = jnp.sum(seen_BxTxS, axis=-1, dtype=jnp.int32) - 1
    positions = _positions(positions, virtual, config.num_virtual_tokens, counted)
    k_positions = jnp.pad(positions, ((0, 0), (config.prefix_length, 0)))
    if cache is not None:
        positions = jnp.broadcast_to(positions, segments.shape)
        cache = caches.mark(cache, segments, positions)
        k_positions = cache.positions_BxS
    return positions, _layer_views(config, positions, k_positions, seen_BxTxS, k_segments), cache


def _causal(T: int, S: int, start: jax.Array | int) -> jax.Array:
    return jnp.arange(S)[None, :] <= start + jnp.arange(T)[:, None]


def _positions(given: jax.Array | None, virtual: int, shift: int, default: jax.Array) -> jax.Array:
    """Given positions, moved behind the model's virtual tokens; `virtual` of those are among the tokens."""
    if given is None:
        return default
    before = jnp.broadcast_to(shift - virtual + jnp.arange(virtual, dtype=given.dtype), (given.shape[0], virtual))
    return jnp.concatenate([before, given + shift], axis=1)


def _layer_views(c, positions_BxT, k_positions_BxS, seen_BxTxS, k_segments_BxS) -> AttentionInputs:
    """The view of all layers; when local and global ones alternate, both stacked: `x[0]` global, `x[1]` local."""
    wide = near = seen_BxTxS
    if seen_BxTxS is not None and c.window:
        close = positions_BxT[:, :, None] - k_positions_BxS[:, None, :] < c.window
        near = seen_BxTxS & (close | (k_segments_BxS == PREFIX)[:, None, :])
    whole = c.rope_theta, c.rope_scaling
    local = (c.local_rope_theta, None) if c.local_rope_theta else whole
    if not c.mixed:
        return _view(c, positions_BxT, *(local if c.window else whole), near)
    views = _view(c, positions_BxT, *whole, wide), _view(c, positions_BxT, *local, near)
    return jax.tree.map(lambda *x: jnp.stack(x), *views)


def _view(c, positions_BxT, theta, scaling, seen_BxTxS) -> AttentionInputs:
    mask = None if seen_BxTxS is None else seen_BxTxS[:, None]
    if c.learned_positions:
        return AttentionInputs(mask_Bx1xTxS=mask)
    return AttentionInputs(
        *rope.tables(positions_BxT, rope.frequencies(c.head_dim, theta, scaling) / c.position_factor), mask
    )


def bidirectional(
    segments: jax.Array | None, virtual: int, length: int, prefix: int = 0
) -> tuple[jax.Array, AttentionInputs]:
    """`(positions, view)` of `length` tokens that see their whole segment (None: all of the row) and the prefix.

    Virtual tokens see every real token of the row: a row with virtual tokens is to hold one segment.
    """
    if segments is None:
        return prefix + jnp.arange(length)[None, :], AttentionInputs()
    segments = with_prompt(segments, virtual)
    k_segments = with_prefix(segments, prefix)
    visible_BxTxS = seen(segments, k_segments)
    positions_BxT = (
        jnp.sum(visible_BxTxS & _causal(length, length + prefix, prefix)[None], axis=-1, dtype=jnp.int32) - 1
    )
    if virtual:
        visible_BxTxS |= (segments[:, :, None] == EVERY) & (k_segments[:, None, :] > 0)
    return positions_BxT, AttentionInputs(mask_Bx1xTxS=visible_BxTxS[:, None])
