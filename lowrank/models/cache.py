"""The key-value cache of a decoder.

Shapes: L layers, B rows, S slots, K key heads, H head width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What past tokens left behind. All rows write the same slots, in order; `segments` 0 marks padding among them."""

    keys: dict[str, jax.Array]  # one `[L, B, S, K, H]` for each stack of layers
    values: dict[str, jax.Array]
    segments_BxS: jax.Array
    positions_BxS: jax.Array
    index: jax.Array  # int32 []: the next slot to write
    prompted: bool = dataclasses.field(metadata={"static": True})  # prefix and virtual tokens are in, or there are none
    num_virtual_tokens: int = dataclasses.field(default=0, metadata={"static": True})  # slots for those
    gates: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # `[L, B, 1, G]` of layers with a router


def empty(
    depths: dict[str, int], batch: int, length: int, kv_heads: int, head_dim: int, dtype: str, virtual: int = 0
) -> Cache:
    """A cache with nothing in it, for `length` tokens and what stands before them."""
    slots = length + virtual
    kv = {name: jnp.zeros((depth, batch, slots, kv_heads, head_dim), dtype) for name, depth in depths.items()}
    marks = jnp.zeros((batch, slots), jnp.int32)
    return Cache(kv, kv, marks, marks, jnp.int32(0), prompted=not virtual, num_virtual_tokens=virtual)


def check(cache: Cache, length: int, virtual: int) -> None:
    """Raises UserError unless the cache was made for `virtual` tokens before the first, and has slots for `length`."""
    slots = cache.segments_BxS.shape[1]
    if cache.num_virtual_tokens != virtual:
        raise UserError(f"the cache has room for {cache.num_virtual_tokens} virtual tokens, the model has {virtual}")
    if slots < length + virtual:
        raise UserError(f"the cache has {slots} slots: too few for {length} tokens and {virtual} virtual ones")


def begin(cache: Cache, prefix: dict[str, tuple[jax.Array, jax.Array]], segment: int) -> Cache:
    """The empty cache with a prefix `[L, P, K, H]` for each stack in its first slots, marked as `segment`."""
    B = cache.segments_BxS.shape[0]
    rows = {n: tuple(jnp.broadcast_to(x[:, None], (len(x), B, *x.shape[1:])) for x in kv) for n, kv in prefix.items()}
    P = next(iter(prefix.values()))[0].shape[1]
    marks = jnp.full((B, P), segment, jnp.int32), jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    return dataclasses.replace(advance(mark(cache, *marks), rows), prompted=False)


def mark(cache: Cache, segments_BxT: jax.Array, positions_BxT: jax.Array) -> Cache:
    """The cache with the marks of T further tokens; `advance` adds their keys and values."""
    return dataclasses.replace(
        cache,
        segments_BxS=put(cache.segments_BxS, segments_BxT, cache.index, axis=1),
        positions_BxS=put(cache.positions_BxS, positions_BxT, cache.index, axis=1),
    )


def advance(cache: Cache, new: dict[str, tuple[jax.Array, ...]]) -> Cache:
    """The cache with the keys and values `[L, B, T, K, H]` of T further tokens, written once for all layers.

    The gates, which may follow these, are those of the first tokens: they stay.
    """
    keys = {name: put(cache.keys[name], k, cache.index, axis=2) for name, (k, *_) in new.items()}
    values = {name: put(cache.values[name], v, cache.index, axis=2) for name, (_, v, *_) in new.items()}
    gates = {name: each[2] for name, each in new.items() if len(each) > 2 and each[2] is not None}
    T = next(iter(new.values()))[0].shape[2]
    return dataclasses.replace(cache, keys=keys, values=values, index=cache.index + T, prompted=True, gates=gates)


def of(cache: Cache, name: str) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The keys, values and gates of a stack's layers; no gates before the first tokens, or without a router."""
    return cache.keys[name], cache.values[name], cache.gates.get(name)


def put(slots: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """`slots` with `new` written from `index` on, in the dtype of the slots."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis)
