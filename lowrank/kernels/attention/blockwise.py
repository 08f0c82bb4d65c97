"""Attention block by block with a running maximum: no array of scores `[T, S]`, neither forward nor backward.

The forward pass is that of Rabe & Staats 2021 (arXiv:2112.05682); the backward pass computes the probabilities again
from each query's log-sum-exp, as FlashAttention does (Dao et al. 2022, arXiv:2205.14135). A block of queries visits the
blocks of keys from the first to the last that a query of any row may see. Reverse mode is the only derivative.

Shapes: b queries and c keys a block, n blocks of queries, m blocks of keys; the package's own beside these.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank.kernels.attention.mask import Mask, Tokens

BLOCK = 512  # the most queries, and keys, whose scores exist at a time
LOWEST, LEAST_TOTAL = -1e30, 1e-30  # finite, so that a query that sees no key divides 0 by a number


class Options(NamedTuple):
    """The static arguments: the factor of the scores, their soft cap (0: none), and the sizes b and c of the blocks."""

    scale: float
    softcap: float
    b: int
    c: int


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    block: int = 0,
) -> jax.Array:
    """`softmax(scale * q k) v`, `[B, T, N, H]`, summed in float32; 0 for a query that sees no key.

    `block` is the number of queries, and of keys, in a block; 0: 128 to `BLOCK`, for 4 to 8 blocks in a short row.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    block = block or min(BLOCK, max(128, 2 ** (T.bit_length() - 3)))
    options = Options(H**-0.5 if scale is None else scale, softcap, min(block, T), min(block, S))
    return _attend(q.reshape(B, T, K, N // K, H), k, v, mask, options).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask: Mask, options: Options) -> jax.Array:
    return _forward(q_BxTxKxGxH, k_BxSxKxH, v_BxSxKxH, mask, options)[0]


def _forward(q, k, v, mask, options):
    """`out`, `[B, T, K, G, H]`, and the residuals, the last of which is the log-sum-exp of scores `[B, T, K, G]`."""
    T, S = q.shape[1], k.shape[1]
    keys, values, score = _split(k, options.c), _split(v, options.c), _scores(mask, T, S, options)

    def attend_block(block):
        i, first, end, q_b = block

        def add(j, sums):
            top, total, out = sums
            s, seen = score(q_b, keys[j], i, j)
            new = jnp.maximum(top, jnp.max(s, axis=-1, initial=LOWEST, where=seen))
            p, shrink = jnp.where(seen, jnp.exp(s - new[..., None]), 0), jnp.exp(top - new)
            more = _product("BKGbc,BcKH->BKGbH", p.astype(v.dtype), values[j])
            return new, total * shrink + jnp.sum(p, axis=-1), out * shrink[..., None] + more

        top, total, out = jax.lax.fori_loop(first, end, add, _empty_sums(q_b))
        total = jnp.maximum(total, LEAST_TOTAL)
        out = (out / total[..., None]).astype(q.dtype)
        return jnp.moveaxis(out, 3, 1), jnp.moveaxis(top + jnp.log(total), 3, 1)

    out, lse = jax.lax.map(attend_block, (*visits(mask, T, S, options), _split(q, options.b)))
    out, lse = _join(out, T), _join(lse, T)
    return out, (q, k, v, mask, out, lse)


def _empty_sums(q_BxbxKxGxH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    B, b, K, G, H = q_BxbxKxGxH.shape
    zeros = jnp.zeros((B, K, G, b), jnp.float32)
    return zeros + LOWEST, zeros, jnp.zeros((B, K, G, b, H), jnp.float32)


def _backward(options, residuals, g):
    q, k, v, mask, out, lse = residuals
    T, S = q.shape[1], k.shape[1]
    keys, values, score = _split(k, options.c), _split(v, options.c), _scores(mask, T, S, options)
    g_out = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, T, K, G]

    def attend_block(key_gradients, block):
        i, first, end, q_b, g_b, *per_query = block
        lse_b, g_out_b = (jnp.moveaxis(x, 1, 3)[..., None] for x in per_query)

        def add(j, gradients):
            dq, dk, dv = gradients
            s, seen = score(q_b, keys[j], i, j)
            p = jnp.where(seen, jnp.exp(s - lse_b), 0)
            ds = p * (_product("BbKGH,BcKH->BKGbc", g_b, values[j]) - g_out_b) * options.scale
            ds = ds * (1 - jnp.square(s / options.softcap)) if options.softcap else ds
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dk = _add_block(dk, j, _product("BKGbc,BbKGH->BcKH", ds, q_b))
            dv = _add_block(dv, j, _product("BKGbc,BbKGH->BcKH", p, g_b))
            return dq + _product("BKGbc,BcKH->BbKGH", ds, keys[j]), dk, dv

        dq = jnp.zeros(q_b.shape, jnp.float32)
        dq, *key_gradients = jax.lax.fori_loop(first, end, add, (dq, *key_gradients))
        return tuple(key_gradients), dq.astype(q.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    blocks = (*visits(mask, T, S, options), *(_split(x, options.b) for x in (q, g, lse, g_out)))
    (dk, dv), dq = jax.lax.scan(attend_block, (zeros, zeros), blocks)
    return _join(dq, T), _join(dk, S).astype(k.dtype), _join(dv, S).astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(mask: Mask, T: int, S: int, options: Options) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`score(q_b, k_c, i, j)`: the scores `[B, K, G, b, c]` of blocks i and j, and the bools of those that count."""
    queries, keys = _padded(mask, T, S, options)

    def score(q_b, k_c, i, j):
        s = _product("BbKGH,BcKH->BKGbc", q_b, k_c) * options.scale
        s = options.softcap * jnp.tanh(s / options.softcap) if options.softcap else s
        seen = mask.seen(queries.part(i * options.b, options.b), keys.part(j * options.c, options.c))
        if S % options.c:
            seen &= (j * options.c + jnp.arange(options.c) < S)[None, None]
        return s, seen[:, None, None]

    return score


def visits(mask: Mask, T: int, S: int, options: Options) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(i, first, end)` `[n]`: the blocks of queries, and the first and the end of the blocks of keys each visits."""
    queries, keys = _padded(mask, T, S, options)
    n, m = -(-T // options.b), -(-S // options.c)
    seen_nxm = jnp.any(mask.may_see(_bounds(queries, n, options.b), _bounds(keys, m, options.c)), axis=0)
    end = jnp.max(jnp.where(seen_nxm, jnp.arange(1, m + 1)[None], 0), axis=1)
    return jnp.arange(n), jnp.argmax(seen_nxm, axis=1), end


def _padded(mask: Mask, T: int, S: int, options: Options) -> tuple[Tokens, Tokens]:
    return mask.queries.padded(T + -T % options.b), mask.keys.padded(S + -S % options.c)


def _bounds(tokens: Tokens, blocks: int, size: int) -> tuple[Tokens, Tokens]:
    """The least and the greatest of the segments, positions and slots of each block, `[B, blocks]`."""
    parts = tokens.part(0, blocks * size).map(lambda x: x.reshape(len(x), blocks, size))
    return parts.map(lambda x: jnp.min(x, axis=2)), parts.map(lambda x: jnp.max(x, axis=2))


def _split(x: jax.Array, size: int) -> jax.Array:
    """`[B, T, ...]` in blocks `[n, B, size, ...]`, the last one filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split` for `length` tokens."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :length]


def _add_block(x: jax.Array, j: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, x[j] + block, j, 0)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
