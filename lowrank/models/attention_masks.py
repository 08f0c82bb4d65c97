"""The inputs of attention: masks and rope tables, computed from segments and positions before any layer runs.

Shapes: B rows, T tokens (virtual ones first), S keys, H head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.models import kv_cache, rope
from lowrank.models.kv_cache import Cache

PROMPT_SEGMENT = -1  # the segment of virtual tokens: all segments see them
PREFIX_SEGMENT = -2  # the segment of a prefix's keys: all segments see them, at any distance


class AttentionInputs(NamedTuple):
    """Rope tables `[B, T, 1, H/2]` (None: no rope), and a mask `[B, 1, T, S]` (None: all keys, or causal)."""

    cos: jax.Array | None = None
    sin: jax.Array | None = None
    mask_Bx1xTxS: jax.Array | None = None


def prepend_prompt_segments(segments_BxT: jax.Array, num_prompt: int) -> jax.Array:
    """The segments of a sequence with `num_prompt` virtual tokens before it."""
    return jnp.pad(segments_BxT, ((0, 0), (num_prompt, 0)), constant_values=PROMPT_SEGMENT)


def prepend_prefix_segments(segments_BxT: jax.Array, length: int) -> jax.Array:
    """The segments of the keys of a sequence with a prefix of `length` keys before them."""
    return jnp.pad(segments_BxT, ((0, 0), (length, 0)), constant_values=PREFIX_SEGMENT)


def same_segment_mask(q_segments_BxT: jax.Array, k_segments_BxS: jax.Array) -> jax.Array:
    """`[B, T, S]` bool: whether query and key have one segment, or the key belongs to all segments."""
    k_Bx1xS = k_segments_BxS[:, None, :]
    return (q_segments_BxT[:, :, None] == k_Bx1xS) | (k_Bx1xS < 0)


def causal_inputs(
    config: Any,
    batch: int,
    length: int,
    num_prompt: int,
    positions: jax.Array | None,
    segments: jax.Array | None,
    cache: Cache | None,
) -> tuple[jax.Array, AttentionInputs, Cache | None]:
    """`(positions [B, T], inputs, cache)` of `length` tokens, the first `num_prompt` of them virtual.

    The keys are the model's prefix, then those of the tokens; or the slots of the cache, which holds the prefix.
    `positions` and `segments` are those of the real tokens, or None. The returned cache has these tokens marked. With
    neither segments nor a cache there is no mask: attention applies its own causal mask.
    """
    if segments is None and cache is None and not config.needs_mask:
        positions = _shift_positions(positions, num_prompt, config.num_virtual_tokens, jnp.arange(length)[None, :])
        return positions, _layer_inputs(config, positions, positions, None, None), None
    if segments is None:
        segments = jnp.ones((1 if cache is None else batch, length - num_prompt), jnp.int32)
    segments = prepend_prompt_segments(segments, num_prompt)
    k_segments, start = prepend_prefix_segments(segments, config.prefix_length), config.prefix_length
    if cache is not None:
        start = cache.index
        k_segments = kv_cache.update_slots(cache.segments_BxS, segments, start, axis=1)
    mask_BxTxS = same_segment_mask(segments, k_segments) & _causal_mask(length, k_segments.shape[1], start)[None]
    counted = jnp.sum(mask_BxTxS, axis=-1, dtype=jnp.int32) - 1
    positions = _shift_positions(positions, num_prompt, config.num_virtual_tokens, counted)
    k_positions = jnp.pad(positions, ((0, 0), (config.prefix_length, 0)))
    if cache is not None:
        positions = jnp.broadcast_to(positions, segments.shape)
        cache = kv_cache.mark_slots(cache, segments, positions)
        k_positions = cache.positions_BxS
    return positions, _layer_inputs(config, positions, k_positions, mask_BxTxS, k_segments), cache


def _causal_mask(T: int, S: int, start: jax.Array | int) -> jax.Array:
    return jnp.arange(S)[None, :] <= start + jnp.arange(T)[:, None]


def _shift_positions(positions: jax.Array | None, num_prompt: int, shift: int, default: jax.Array) -> jax.Array:
    """Given positions, moved by `shift` behind all virtual tokens, the last `num_prompt` of which come first."""
    if positions is None:
        return default
    virtual = shift - num_prompt + jnp.arange(num_prompt, dtype=positions.dtype)
    virtual_BxP = jnp.broadcast_to(virtual, (positions.shape[0], num_prompt))
    return jnp.concatenate([virtual_BxP, positions + shift], axis=1)


def _layer_inputs(c: Any, positions_BxT, k_positions_BxS, mask_BxTxS, k_segments_BxS) -> AttentionInputs:
    """The inputs of all layers; when local and global layers alternate, both stacked: `x[0]` global, `x[1]` local."""
    local_mask_BxTxS = mask_BxTxS
    if mask_BxTxS is not None and c.window:
        close = positions_BxT[:, :, None] - k_positions_BxS[:, None, :] < c.window
        local_mask_BxTxS = mask_BxTxS & (close | (k_segments_BxS == PREFIX_SEGMENT)[:, None, :])
    global_rope = c.rope_theta, c.rope_scaling
    local_rope = (c.local_rope_theta, None) if c.local_rope_theta else global_rope
    if not c.mixed:
        return _inputs(c, positions_BxT, local_rope if c.window else global_rope, local_mask_BxTxS)
    both = _inputs(c, positions_BxT, global_rope, mask_BxTxS), _inputs(c, positions_BxT, local_rope, local_mask_BxTxS)
    return jax.tree.map(lambda *x: jnp.stack(x), *both)


def _inputs(c: Any, positions_BxT, theta_and_scaling, mask_BxTxS) -> AttentionInputs:
    mask_Bx1xTxS = None if mask_BxTxS is None else mask_BxTxS[:, None]
    if c.learned_positions:
        return AttentionInputs(mask_Bx1xTxS=mask_Bx1xTxS)
    frequencies_F = rope.rope_frequencies(c.head_dim, *theta_and_scaling) / c.position_factor
    return AttentionInputs(*rope.rope_tables(positions_BxT, frequencies_F), mask_Bx1xTxS)


def bidirectional_inputs(
    segments: jax.Array | None, num_prompt: int, length: int, prefix_length: int = 0
) -> tuple[jax.Array, AttentionInputs]:
    """`(positions, inputs)` of `length` tokens that see their whole segment (None: the whole row) and the prefix.

    Virtual tokens see every real token of the row: a row with virtual tokens must hold one segment.
    """
    if segments is None:
        return prefix_length + jnp.arange(length)[None, :], AttentionInputs()
    segments = prepend_prompt_segments(segments, num_prompt)
    k_segments = prepend_prefix_segments(segments, prefix_length)
    mask_BxTxS = same_segment_mask(segments, k_segments)
    before_BxTxS = mask_BxTxS & _causal_mask(length, length + prefix_length, prefix_length)[None]
    positions_BxT = jnp.sum(before_BxTxS, axis=-1, dtype=jnp.int32) - 1
    if num_prompt:
        mask_BxTxS |= (segments[:, :, None] == PROMPT_SEGMENT) & (k_segments[:, None, :] > 0)
    return positions_BxT, AttentionInputs(mask_Bx1xTxS=mask_BxTxS[:, None])
