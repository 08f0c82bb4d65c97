"""Context parallelism: the devices of the mesh's axis `context` share the tokens of each row.

Each device attends from its own queries to the keys and values of all, which are gathered. Under a causal mask the last
queries have the most keys, so queries are exchanged before and after: of the 2C chunks of a row, device i of C attends
from the chunks i and 2C - 1 - i, which have equally many keys on every device.

A ring, which passes keys and values on in place of gathering them, is not taken. In plain JAX, with each of its steps
recomputed for the gradient, one layer of Llama-3.1-8B compiled for v5e:4x4, forward and backward, has 4.8 GB of
temporaries over 32768 tokens with C = 4 and 8.8 GB over 131072 with C = 16; gathered keys and splash have 0.4 and 1.4.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.kernels.attention.mask import Mask

AXIS = "context"


def attend(form: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """`form(q, k, v, mask)` inside `jax.shard_map`, for this device's part of the queries `[B, T / C, N, H]`.

    `k`, `v` and the mask's keys are whole, or parts like the queries if the keys are those of the queries' tokens. The
    mask's queries have slots.
    """
    if k.shape[1] == q.shape[1]:
        k, v, keys = jax.lax.all_gather((k, v, mask.keys), AXIS, axis=1, tiled=True)
        mask = dataclasses.replace(mask, keys=keys)
    if not mask.causal:
        return form(q, k, v, mask)
    mask = dataclasses.replace(mask, queries=mask.queries.map(balance))
    return restore(form(balance(q), k, v, mask))


def balance(x: jax.Array) -> jax.Array:
    """Of `[B, T / C, ...]`, chunks 2i and 2i + 1 on device i, the exchanged chunks i and 2C - 1 - i."""
    even, odd = (jax.lax.ppermute(part, AXIS, _moves(half)) for half, part in enumerate(jnp.split(x, 2, axis=1)))
    return jnp.concatenate(_ordered(even, odd), axis=1)


def restore(x: jax.Array) -> jax.Array:
    """The inverse of `balance`."""
    parts = _ordered(*jnp.split(x, 2, axis=1))
    back = ([(to, at) for at, to in _moves(half)] for half in (0, 1))
    return jnp.concatenate([jax.lax.ppermute(part, AXIS, b) for part, b in zip(parts, back, strict=True)], axis=1)


def balanced_slots(length: int, parts: int) -> np.ndarray:
    """The slots `[length]` of the queries that `balance` gives the devices, one device after another."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def own_part(x: jax.Array, axis: int) -> jax.Array:
    """This device's part of an array that all devices hold."""
    size = x.shape[axis] // jax.lax.axis_size(AXIS)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size, axis)


def _moves(half: int) -> list[tuple[int, int]]:
    """`(from, to)` of the first or second chunk of each device: chunk c belongs to device c or 2C - 1 - c."""
    C = jax.lax.axis_size(AXIS)
    return [(i, min(2 * i + half, 2 * C - 1 - 2 * i - half)) for i in range(C)]


def _ordered(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(x, y)` on devices of an even index, whose lower chunk is even, and `(y, x)` on the others."""
    even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(even, x, y), jnp.where(even, y, x)
