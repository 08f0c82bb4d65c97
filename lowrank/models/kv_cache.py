"""The key-value cache of a decoder. Each row fills its own slots from the first one on, its virtual tokens first.

The slot of a token is also its position. Shapes: L layers, B rows of the cache, S slots, T new tokens, n rows of
entries, K key heads, H head width, G gates.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Entries(NamedTuple):
    """What a stack of layers computes of new tokens for the cache: keys and values `[L, n, T, K, H]`.

    `gates`, of layers with a router, are `[L, n, 1, G]`.
    """

    keys: jax.Array
    values: jax.Array
    gates: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the past tokens of each row."""

    keys: dict[str, jax.Array]  # one `[L, B, K, S, H]` per stack of layers
    values: dict[str, jax.Array]
    index_B: jax.Array  # int32: the slots in use, and so the slot of the next token
    gates: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # `[L, B, 1, G]` of layers with a router

    @property
    def slots(self) -> int:
        """The length of each row."""
        return next(iter(self.keys.values())).shape[3]


class Slots(NamedTuple):
    """The slots of one stack of layers, which all its layers read; all None for the first tokens of rows."""

    keys: Any = None  # [L, B, K, S, H]
    values: Any = None
    index_B: Any = None


class Past(NamedTuple):
    """What one layer has before its tokens: a prefix `[P, K, H]`, or its index in the stack and its gates."""

    prefix: tuple[jax.Array, jax.Array] | None = None
    layer: Any = None  # int32 []
    gates: jax.Array | None = None


NOTHING = Past()


def empty_cache(depths: Mapping[str, int], batch: int, slots: int, kv_heads: int, head_dim: int, dtype: str) -> Cache:
    """A cache whose rows are empty."""
    empty = lambda: {n: jnp.zeros((L, batch, kv_heads, slots, head_dim), dtype) for n, L in depths.items()}  # noqa: E731
    return Cache(empty(), empty(), jnp.zeros(batch, jnp.int32))


def read_stack(cache: Cache, name: str) -> tuple[Slots, Past]:
    """The slots of a stack, and what each of its layers has of its own, with an axis of layers."""
    layers = jnp.arange(len(cache.keys[name]), dtype=jnp.int32)
    slots = Slots(cache.keys[name], cache.values[name], cache.index_B)
    return slots, Past(layer=layers, gates=cache.gates.get(name))


def insert_rows(cache: Cache, entries: Mapping[str, Entries], rows_n: jax.Array, lengths_n: jax.Array) -> Cache:
    """The cache with `rows` replaced by rows whose first tokens have these entries; a row beyond the last is dropped.

    `lengths` are the numbers of their entries that are in use, virtual tokens among them.
    """

    def write(slots, new):
        T = new.shape[2]
        return slots.at[:, rows_n, :, :T].set(new.swapaxes(2, 3).astype(slots.dtype), mode="drop")

    gates = {name: x.at[:, rows_n].set(entries[name].gates, mode="drop") for name, x in cache.gates.items()}
    return Cache(
        {name: write(cache.keys[name], new.keys) for name, new in entries.items()},
        {name: write(cache.values[name], new.values) for name, new in entries.items()},
        cache.index_B.at[rows_n].set(lengths_n, mode="drop"),
        gates,
    )


def append_tokens(cache: Cache, entries: Mapping[str, Entries]) -> Cache:
    """The cache with T more tokens of each row, written once for all layers of a stack."""
    T, B = next(iter(entries.values())).keys.shape[2], len(cache.index_B)
    rows_Bx1 = jnp.arange(B)[:, None]
    slots_BxT = cache.index_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]

    def write(slots, new):  # the indexed axes come first: [B, T, L, K, H]
        return slots.at[:, rows_Bx1, :, slots_BxT].set(new.transpose(1, 2, 0, 3, 4).astype(slots.dtype), mode="drop")

    keys = {name: write(cache.keys[name], new.keys) for name, new in entries.items()}
    values = {name: write(cache.values[name], new.values) for name, new in entries.items()}
    return dataclasses.replace(cache, keys=keys, values=values, index_B=cache.index_B + T)
