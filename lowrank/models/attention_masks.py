"""The inputs of attention: masks and rope tables, computed from segments and positions before any layer runs.

Shapes: B rows, T tokens (virtual ones first), S keys, H head width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.kernels.attention.mask import PREFIX_SEGMENT, PROMPT_SEGMENT, Mask, Tokens
from lowrank.models import kv_cache, rope
from lowrank.models.kv_cache import Cache


class AttentionInputs(NamedTuple):
    """The mask, and rope tables `[B, T, 1, H/2]` (None: no rope), with an axis in front where two kinds alternate."""

    mask: Mask
    cos: jax.Array | None = None
    sin: jax.Array | None = None

    def of_layer(self, local: jax.Array) -> "AttentionInputs":
        """The inputs of a layer of the kind `local` (1: local, 0: global), where both kinds alternate."""
        mask = dataclasses.replace(self.mask, local=local.astype(bool))
        return AttentionInputs(mask, *jax.tree.map(lambda x: x[local], self[1:]))


def prepend_prompt_segments(segments_BxT: jax.Array, num_prompt: int) -> jax.Array:
    """The segments of a sequence with `num_prompt` virtual tokens before it."""
    return jnp.pad(segments_BxT, ((0, 0), (num_prompt, 0)), constant_values=PROMPT_SEGMENT)


def prepend_prefix_segments(segments_BxT: jax.Array, length: int) -> jax.Array:
    """The segments of the keys of a sequence with a prefix of `length` keys before them."""
    return jnp.pad(segments_BxT, ((0, 0), (length, 0)), constant_values=PREFIX_SEGMENT)


def count_seen(segments_BxS: jax.Array) -> jax.Array:
    """`[B, S]` int32: how many keys before its own slot a token of each slot sees, of its segment or of all."""
    indices_1xS = jnp.arange(segments_BxS.shape[1], dtype=jnp.int32)[None]
    order_BxS = jnp.argsort(segments_BxS, axis=1, stable=True)
    ordered_BxS = jnp.take_along_axis(segments_BxS, order_BxS, axis=1)
    starts_BxS = jnp.diff(ordered_BxS, axis=1, prepend=ordered_BxS[:, :1] - 1) != 0
    rank_BxS = indices_1xS - jax.lax.cummax(jnp.where(starts_BxS, indices_1xS, 0), axis=1)
    rank_BxS = jnp.take_along_axis(rank_BxS, jnp.argsort(order_BxS, axis=1), axis=1)
    of_all_BxS = jnp.cumsum(segments_BxS < 0, axis=1, dtype=jnp.int32)
    return jnp.where(segments_BxS < 0, of_all_BxS - 1, of_all_BxS + rank_BxS)


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
    neither segments nor a cache the mask depends on the slots alone.
    """
    shift = num_prompt, config.num_virtual_tokens
    if segments is None and cache is None and not config.needs_mask:
        positions = _shift_positions(positions, *shift, lambda: jnp.arange(length)[None, :])
        return positions, _layer_inputs(config, positions, Mask(causal=True, window=config.window)), None
    if segments is None:
        segments = jnp.ones((1 if cache is None else batch, length - num_prompt), jnp.int32)
    segments = prepend_prompt_segments(segments, num_prompt)
    k_segments, start = prepend_prefix_segments(segments, config.prefix_length), config.prefix_length
    if cache is not None:
        start = cache.index
        k_segments = kv_cache.update_slots(cache.segments_BxS, segments, start, axis=1)
    seen = lambda: jax.lax.dynamic_slice_in_dim(count_seen(k_segments), start, length, axis=1)  # noqa: E731
    positions = _shift_positions(positions, *shift, seen)
    k_positions = jnp.pad(positions, ((0, 0), (config.prefix_length, 0)))
    if cache is not None:
        positions = jnp.broadcast_to(positions, segments.shape)
        cache = kv_cache.mark_slots(cache, segments, positions)
        k_positions = cache.positions_BxS
    slots = None if cache is None and not start else start + jnp.arange(length, dtype=jnp.int32)[None]
    mask = Mask(
        Tokens(segments, positions, slots),
        Tokens(k_segments, k_positions),
        virtual=config.num_virtual_tokens > 0,
        causal=True,
        window=config.window,
    )
    return positions, _layer_inputs(config, positions, mask), cache


def _shift_positions(
    positions: jax.Array | None, num_prompt: int, shift: int, default: Callable[[], jax.Array]
) -> jax.Array:
    """Given positions, moved by `shift` behind all virtual tokens, the last `num_prompt` of which come first."""
    if positions is None:
        return default()
    virtual = shift - num_prompt + jnp.arange(num_prompt, dtype=positions.dtype)
    virtual_BxP = jnp.broadcast_to(virtual, (positions.shape[0], num_prompt))
    return jnp.concatenate([virtual_BxP, positions + shift], axis=1)


def _layer_inputs(c: Any, positions_BxT: jax.Array, mask: Mask) -> AttentionInputs:
    """The inputs of all layers; when local and global layers alternate, rope tables `x[0]` global and `x[1]` local."""
    if c.learned_positions:
        return AttentionInputs(mask)
    global_rope = c.rope_theta, c.rope_scaling
    local_rope = (c.local_rope_theta, None) if c.local_rope_theta else global_rope
    if not c.mixed:
        return AttentionInputs(mask, *_rope_tables(c, positions_BxT, local_rope if c.window else global_rope))
    both = (_rope_tables(c, positions_BxT, kind) for kind in (global_rope, local_rope))
    return AttentionInputs(mask, *jax.tree.map(lambda *x: jnp.stack(x), *both))


def _rope_tables(c: Any, positions_BxT: jax.Array, theta_and_scaling: Any) -> tuple[jax.Array, jax.Array]:
    return rope.rope_tables(positions_BxT, rope.rope_frequencies(c.head_dim, *theta_and_scaling) / c.position_factor)


def bidirectional_inputs(
    segments: jax.Array | None, num_prompt: int, length: int, prefix_length: int = 0
) -> tuple[jax.Array, AttentionInputs]:
    """`(positions, inputs)` of `length` tokens that see their whole segment (None: the whole row) and the prefix.

    Virtual tokens see every real token of the row: a row with virtual tokens must hold one segment.
    """
    if segments is None:
        return prefix_length + jnp.arange(length)[None, :], AttentionInputs(Mask())
    segments = prepend_prompt_segments(segments, num_prompt)
    k_segments = prepend_prefix_segments(segments, prefix_length)
    virtual = num_prompt + prefix_length > 0
    mask = Mask(Tokens(segments), Tokens(k_segments), virtual=virtual, prompt_sees_all=num_prompt > 0)
    return count_seen(k_segments)[:, prefix_length:], AttentionInputs(mask)
