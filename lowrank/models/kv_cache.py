"""The key-value cache of a decoder: the keys and values of past tokens, written slot by slot.

Shapes: L layers, B rows, S slots, T new tokens, P prefix length, K key heads, H head width, G gates.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError, plural


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of past tokens. All rows write the same slots, in order; padding has segment 0."""

    keys: dict[str, jax.Array]  # one `[L, B, S, K, H]` per stack of layers
    values: dict[str, jax.Array]
    segments_BxS: jax.Array
    positions_BxS: jax.Array
    index: jax.Array  # int32 []: the next slot to write
    prompted: bool = dataclasses.field(metadata={"static": True})  # virtual tokens are written, or there are none
    num_virtual_tokens: int = dataclasses.field(default=0, metadata={"static": True})  # the slots for these
    gates: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # `[L, B, 1, G]` of layers with a router


def empty_cache(
    depths: Mapping[str, int],
    batch: int,
    length: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    num_virtual_tokens: int = 0,
) -> Cache:
    """An empty cache for `batch` rows of `length` tokens and the virtual tokens before them."""
    slots = length + num_virtual_tokens
    kv = {name: jnp.zeros((depth, batch, slots, kv_heads, head_dim), dtype) for name, depth in depths.items()}
    marks = jnp.zeros((batch, slots), jnp.int32)
    return Cache(kv, kv, marks, marks, jnp.int32(0), not num_virtual_tokens, num_virtual_tokens)


def check_cache(cache: Cache, length: int, num_virtual_tokens: int) -> None:
    """Raises UserError unless the cache has slots for `num_virtual_tokens` virtual tokens and `length` real ones."""
    slots = cache.segments_BxS.shape[1]
    if cache.num_virtual_tokens != num_virtual_tokens:
        made, needed = (plural(n, "virtual token") for n in (cache.num_virtual_tokens, num_virtual_tokens))
        raise UserError(f"the cache has slots for {made}, and the model has {needed}: make it with init_cache")
    if slots < length + num_virtual_tokens:
        needed = f"{plural(length, 'token')} and {plural(num_virtual_tokens, 'virtual token')}"
        raise UserError(f"the cache has only {plural(slots, 'slot')} for {needed}: make a longer one with init_cache")


def insert_prefix(cache: Cache, prefix: Mapping[str, tuple[jax.Array, jax.Array]], segment: int) -> Cache:
    """The empty cache with a prefix `[L, P, K, H]` per stack in its first slots, which get the segment `segment`."""
    B = cache.segments_BxS.shape[0]
    rows = {n: tuple(jnp.broadcast_to(x[:, None], (len(x), B, *x.shape[1:])) for x in kv) for n, kv in prefix.items()}
    P = next(iter(prefix.values()))[0].shape[1]
    marks = jnp.full((B, P), segment, jnp.int32), jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    return dataclasses.replace(append_tokens(mark_slots(cache, *marks), rows), prompted=False)


def mark_slots(cache: Cache, segments_BxT: jax.Array, positions_BxT: jax.Array) -> Cache:
    """The cache with the segments and positions of T new tokens; `append_tokens` then adds their keys and values."""
    return dataclasses.replace(
        cache,
        segments_BxS=update_slots(cache.segments_BxS, segments_BxT, cache.index, axis=1),
        positions_BxS=update_slots(cache.positions_BxS, positions_BxT, cache.index, axis=1),
    )


def append_tokens(cache: Cache, new: Mapping[str, tuple[jax.Array, ...]]) -> Cache:
    """The cache with the keys and values `[L, B, T, K, H]` of T new tokens, written once for all layers of a stack.

    Gates may follow the keys and values; each layer keeps those that its router computed for the first tokens.
    """
    keys = {name: update_slots(cache.keys[name], k, cache.index, axis=2) for name, (k, *_) in new.items()}
    values = {name: update_slots(cache.values[name], v, cache.index, axis=2) for name, (_, v, *_) in new.items()}
    gates = {name: entries[2] for name, entries in new.items() if len(entries) > 2 and entries[2] is not None}
    T = next(iter(new.values()))[0].shape[2]
    return dataclasses.replace(cache, keys=keys, values=values, index=cache.index + T, prompted=True, gates=gates)


def read_stack(cache: Cache, name: str) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The keys, values and gates of a stack's layers; no gates before the first tokens or without a router."""
    return cache.keys[name], cache.values[name], cache.gates.get(name)


def update_slots(slots: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """`slots` with `new` written from `index` on along `axis`, in the dtype of the slots."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis)
