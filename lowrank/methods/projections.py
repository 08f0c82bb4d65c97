"""Random projections of a few numbers into many, regenerated from a key each time: `P x`, `P: [size, d]`, never stored.

Entries have variance 1 / total, so that the columns of P over all `total` parameters are about orthonormal (Li et al.
2018, arXiv:1804.08838). `forward` gives P x and `backward` gives P^T g; both draw P.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from scipy.linalg import hadamard

CHUNK = 1 << 20  # the number of entries of P in memory at a time
ORDERS = 64  # permutations that the blocks of Fastfood take in turn: drawing one is a sort, the slowest part


class Shape(NamedTuple):
    """`size` of the `total` parameters that the vector is projected into."""

    size: int
    total: int


def dense_rows(key: jax.Array, chunk: jax.Array, rows: int, d: int, total: int) -> jax.Array:
    """Rows `chunk * rows, ...` of a dense P, `[rows, d]`: `N(0, 1 / total)`."""
    return jax.random.normal(jax.random.fold_in(key, chunk), (rows, d)) * total**-0.5


def _dense_chunks(size: int, d: int) -> tuple[int, int]:
    rows = max(1, min(size, CHUNK // d))
    return rows, -(-size // rows)


def dense(key: jax.Array, x: jax.Array, shape: Shape) -> jax.Array:
    """`P x` of a Gaussian P, a few rows at a time: `d * size` draws, `CHUNK` of them in memory."""
    rows, chunks = _dense_chunks(shape.size, x.size)
    product = lambda i: jnp.dot(dense_rows(key, i, rows, x.size, shape.total), x, precision="highest")  # noqa: E731
    return jax.lax.map(product, jnp.arange(chunks)).reshape(-1)[: shape.size]


def _dense_back(key: jax.Array, g: jax.Array, d: int, shape: Shape) -> jax.Array:
    rows, chunks = _dense_chunks(shape.size, d)
    g = jnp.pad(g, (0, rows * chunks - shape.size)).reshape(chunks, rows)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, g_rows = part
        return total + jnp.dot(g_rows, dense_rows(key, i, rows, d, shape.total), precision="highest"), None

    return jax.lax.scan(add, jnp.zeros(d, g.dtype), (jnp.arange(chunks), g))[0]


def sparse_entries(key: jax.Array, column: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """`(rows, values)` of one column of a sparse P: about `size / sqrt(total)` rows, one size, random signs."""
    count = max(1, round(shape.size / shape.total**0.5))
    places, signs = jax.random.split(jax.random.fold_in(key, column))
    rows = jax.random.randint(places, (count,), 0, shape.size)
    return rows, jax.random.rademacher(signs, (count,), jnp.float32) * (shape.size / (shape.total * count)) ** 0.5


def _columns(key: jax.Array, d: int, shape: Shape) -> tuple[Callable, jax.Array]:
    """A function of a batch of columns, and the batches `[n, width]`, the last one padded with columns past d."""
    count = max(1, round(shape.size / shape.total**0.5))
    width = max(1, min(d, CHUNK // count))
    batches = jnp.arange(-(-d // width) * width).reshape(-1, width)
    return jax.vmap(lambda column: sparse_entries(key, column, shape)), batches


def sparse(key: jax.Array, x: jax.Array, shape: Shape) -> jax.Array:
    """P with a fraction `1 / sqrt(total)` of its entries not 0 (P. Li et al. 2006): `d * size / sqrt(total)` draws."""
    entries, batches = _columns(key, x.size, shape)
    padded = jnp.pad(x, (0, batches.size - x.size)).reshape(batches.shape)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        columns, x_batch = part
        rows, values = entries(columns)
        return total.at[rows].add(values * jnp.broadcast_to(x_batch[:, None], values.shape)), None

    return jax.lax.scan(add, jnp.zeros(shape.size, x.dtype), (batches, padded))[0]


def _sparse_back(key: jax.Array, g: jax.Array, d: int, shape: Shape) -> jax.Array:
    entries, batches = _columns(key, d, shape)

    def gather(columns: jax.Array) -> jax.Array:
        rows, values = entries(columns)
        return jnp.sum(values * g[rows], axis=-1)

    return jax.lax.map(gather, batches).reshape(-1)[:d]


def fastfood_blocks(key: jax.Array, size: int, d: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(B, Pi, G)`: signs and Gaussians `[blocks, n]` with n the power of two from d on, permutations `[ORDERS, n]`.

    Block i is permuted by `Pi[i % ORDERS]`; there are fewer permutations where there are fewer blocks.
    """
    n = 1 << (d - 1).bit_length()
    blocks = -(-size // n)
    signs, order, gauss = jax.random.split(key, 3)
    places = jnp.tile(jnp.arange(n), (min(blocks, ORDERS), 1))
    places = jax.random.permutation(order, places, axis=1, independent=True)
    return _signs(signs, (blocks, n)), places, jax.random.normal(gauss, (blocks, n))


def _signs(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """1 or -1 at random, from one bit each: a word for each sign would take as long as all the Gaussians."""
    size = math.prod(shape)
    octets = jax.lax.bitcast_convert_type(jax.random.bits(key, (-(-size // 32),), jnp.uint32), jnp.uint8)
    bits = jnp.unpackbits(octets.reshape(-1), count=size, bitorder="little")
    return 1 - 2 * bits.reshape(shape).astype(jnp.float32)


def fastfood(key: jax.Array, x: jax.Array, shape: Shape) -> jax.Array:
    """Stacked blocks `H G Pi H B / (|G| sqrt(total))` of n x n, n the power of two from d on (Le et al. 2013).

    H is the Hadamard matrix: `size * log n` operations. The last block is cut to the rest of `size`.
    """
    signs, places, gauss = fastfood_blocks(key, shape.size, x.size)
    padded = jnp.pad(x, (0, signs.shape[1] - x.size))
    mixed = walsh(signs * jnp.broadcast_to(padded, signs.shape))
    y = walsh(_permuted(mixed, places) * gauss)
    return _over_norm(y, gauss, shape).reshape(-1)[: shape.size]


def _fastfood_back(key: jax.Array, g: jax.Array, d: int, shape: Shape) -> jax.Array:
    signs, places, gauss = fastfood_blocks(key, shape.size, d)
    g = jnp.pad(g, (0, signs.size - shape.size)).reshape(signs.shape)
    mixed = walsh(_over_norm(g, gauss, shape)) * gauss
    back = _permuted(mixed, jnp.argsort(places, axis=1))
    return jnp.sum(walsh(back) * signs, axis=0)[:d]


def _permuted(rows: jax.Array, places: jax.Array) -> jax.Array:
    """`rows` `[blocks, n]` with row i in the order `places[i % ORDERS]`."""
    return jnp.take_along_axis(rows, places[jnp.arange(len(rows)) % len(places)], axis=1)


def _over_norm(y: jax.Array, gauss: jax.Array, shape: Shape) -> jax.Array:
    norm = jnp.linalg.norm(gauss, axis=1, keepdims=True) * shape.total**0.5
    return y / jnp.broadcast_to(norm, y.shape)


def walsh(x: jax.Array) -> jax.Array:
    """`H x` over the last axis, whose length is a power of two, by small Hadamard factors one after another."""
    rows, n = x.shape
    done = 1
    while done < n:
        width = min(128, n // done)
        h = jnp.asarray(hadamard(width), x.dtype)
        # The factor stands on the left: on the right, a CPU takes twice the time.
        x = jnp.einsum("vw,rwb->rvb", h, x.reshape(-1, width, done), precision="highest")
        done *= width
    return x.reshape(rows, n)


PROJECTIONS = {
    "dense": (dense, _dense_back),
    "sparse": (sparse, _sparse_back),
    "fastfood": (fastfood, _fastfood_back),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(kind: str, key: jax.Array, x: jax.Array, shape: Shape) -> jax.Array:
    """`P x`, `[size]`, for `x: [d]`; its gradient draws P again, so that P is not a residual."""
    return PROJECTIONS[kind][0](key, x, shape)


def _forward(kind: str, key: jax.Array, x: jax.Array, shape: Shape) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(kind, key, x, shape), (key, x)


def _backward(kind: str, shape: Shape, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[None, jax.Array]:
    key, x = saved
    return None, PROJECTIONS[kind][1](key, g.astype(x.dtype), x.size, shape)


project.defvjp(_forward, _backward)
