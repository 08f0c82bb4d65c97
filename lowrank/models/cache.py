"""The key-value cache of a decoder.

Shapes: L layers, B rows, S slots, K key heads, H head width.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What past tokens left behind. All rows write the same slots, in order; `segments` 0 marks padding among them."""

    keys: dict[str, jax.Array]  # one `[L, B, S, K, H]` for each stack of layers
    values: dict[str, jax.Array]
    segments_BxS: jax.Array
    positions_BxS: jax.Array
    index: jax.Array  # int32 []: the next slot to write
    prompted: bool = dataclasses.field(metadata={"static": True})  # the virtual prompt tokens are in, or there are none


def empty(
    depths: dict[str, int], batch: int, slots: int, kv_heads: int, head_dim: int, dtype: str, prompted: bool
) -> Cache:
    """A cache with nothing in it."""
    kv = {name: jnp.zeros((depth, batch, slots, kv_heads, head_dim), dtype) for name, depth in depths.items()}
    marks = jnp.zeros((batch, slots), jnp.int32)
    return Cache(kv, kv, marks, marks, jnp.int32(0), prompted)


def mark(cache: Cache, segments_BxT: jax.Array, positions_BxT: jax.Array) -> Cache:
    """The cache with the marks of T further tokens; `advance` adds their keys and values."""
    return dataclasses.replace(
        cache,
        segments_BxS=put(cache.segments_BxS, segments_BxT, cache.index, axis=1),
        positions_BxS=put(cache.positions_BxS, positions_BxT, cache.index, axis=1),
    )


def advance(cache: Cache, new: dict[str, tuple[jax.Array, jax.Array]]) -> Cache:
    """The cache with the keys and values `[L, B, T, K, H]` of T further tokens, written once for all layers."""
    keys = {name: put(cache.keys[name], k, cache.index, axis=2) for name, (k, _) in new.items()}
    values = {name: put(cache.values[name], v, cache.index, axis=2) for name, (_, v) in new.items()}
    T = next(iter(new.values()))[0].shape[2]
    return dataclasses.replace(cache, keys=keys, values=values, index=cache.index + T, prompted=True)


def put(slots: jax.Array, new: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """`slots` with `new` written from `index` on, in the dtype of the slots."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis)
