"""The inputs of attention: masks and rope tables, computed from segments and positions before any layer runs.

Shapes: B rows, T tokens (virtual ones first), S keys, H head width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.kernels.attention.mask import PREFIX_SEGMENT, PROMPT_SEGMENT, Mask, Tokens
from lowrank.models.positions import LayerKind, rope_inputs


class AttentionInputs(NamedTuple):
    """The mask, and rope tables `[B, T, 1, F]` (None: no rope), with an axis in front where layers have several."""

    mask: Mask
    cos: jax.Array | None = None
    sin: jax.Array | None = None
    relative: jax.Array | None = None  # the embeddings of relative positions `[1, R, D]`

    def of_layer(self, kind: LayerKind) -> "AttentionInputs":
        """The inputs of a layer of this kind."""
        mask = self.mask if kind.local is None else dataclasses.replace(self.mask, local=kind.local)
        cos, sin = self.cos, self.sin
        if kind.rope is not None:
            cos, sin = jax.tree.map(lambda x: x[kind.rope], (cos, sin))
        return AttentionInputs(mask, cos, sin, self.relative)


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
    length: int,
    num_prompt: int,
    positions: jax.Array | None,
    segments: jax.Array | None,
    slots: int = 0,
) -> tuple[jax.Array, AttentionInputs]:
    """`(positions [B, T], inputs)` of `length` tokens, the first `num_prompt` of them virtual.

    The keys are the model's prefix, then those of the tokens. `positions` and `segments` are those of the real tokens,
    or None. Without segments the mask depends on the slots alone. `slots` is the length of the cache that they begin,
    or 0.
    """
    shift = num_prompt, config.num_virtual_tokens
    if segments is None and not config.needs_mask:
        positions = _shift_positions(positions, *shift, lambda: jnp.arange(length)[None, :])
        mask = Mask(causal=True, window=config.window)
        return positions, AttentionInputs(mask, *rope_inputs(config, positions, mask, slots))
    if segments is None:
        segments = jnp.ones((1, length - num_prompt), jnp.int32)
    segments = prepend_prompt_segments(segments, num_prompt)
    k_segments, start = prepend_prefix_segments(segments, config.prefix_length), config.prefix_length
    seen = lambda: jax.lax.dynamic_slice_in_dim(count_seen(k_segments), start, length, axis=1)  # noqa: E731
    positions = _shift_positions(positions, *shift, seen)
    k_positions = jnp.pad(positions, ((0, 0), (config.prefix_length, 0)))
    order = None if not start else start + jnp.arange(length, dtype=jnp.int32)[None]
    mask = Mask(
        Tokens(segments, positions, order),
        Tokens(k_segments, k_positions),
        virtual=config.num_virtual_tokens > 0,
        causal=True,
        window=config.window,
    )
    return positions, AttentionInputs(mask, *rope_inputs(config, positions, mask, slots))


def cached_inputs(config: Any, index_B: jax.Array, length: int, slots: int) -> tuple[jax.Array, AttentionInputs]:
    """`(positions [B, T], inputs)` of `length` tokens of each row, the first of which takes the slot `index`."""
    positions_BxT = index_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    mask = Mask(causal=True, window=config.window)
    return positions_BxT, AttentionInputs(mask, *rope_inputs(config, positions_BxT, mask, slots))


def _shift_positions(
    positions: jax.Array | None, num_prompt: int, shift: int, default: Callable[[], jax.Array]
) -> jax.Array:
    """Given positions, moved by `shift` behind all virtual tokens, the last `num_prompt` of which come first."""
    if positions is None:
        return default()
    virtual = shift - num_prompt + jnp.arange(num_prompt, dtype=positions.dtype)
    virtual_BxP = jnp.broadcast_to(virtual, (positions.shape[0], num_prompt))
    return jnp.concatenate([virtual_BxP, positions + shift], axis=1)


def bidirectional_inputs(config: Any, segments: jax.Array | None, length: int) -> tuple[jax.Array, AttentionInputs]:
    """`(positions, inputs)` of `length` tokens, virtual ones included, that see their whole segment and the prefix.

    Without segments a row is one segment. In local layers a token sees its window. Virtual tokens see every real token
    of the row: a row with virtual tokens must hold one segment.
    """
    num_prompt, P = config.num_prompt, config.prefix_length
    if segments is None:
        positions = P + jnp.arange(length)[None, :]
        if P and config.window:
            segments = jnp.ones((1, length - num_prompt), jnp.int32)
        else:
            mask = Mask(window=config.window)
            return positions, AttentionInputs(mask, *rope_inputs(config, positions, mask))
    segments = prepend_prompt_segments(segments, num_prompt)
    k_segments = prepend_prefix_segments(segments, P)
    slots = P + jnp.arange(length, dtype=jnp.int32)[None] if P and config.window else None
    mask = Mask(
        Tokens(segments, slots=slots),
        Tokens(k_segments),
        virtual=num_prompt + P > 0,
        prompt_sees_all=num_prompt > 0,
        window=config.window,
    )
    positions = count_seen(k_segments)[:, P:]
    return positions, AttentionInputs(mask, *rope_inputs(config, positions, mask))
