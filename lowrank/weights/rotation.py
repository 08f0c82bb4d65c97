"""Orthogonal block-diagonal matrices, parametrized by skew-symmetric ones, and products with them.

A skew-symmetric matrix is given by its entries above the diagonal. A butterfly of f factors mixes the blocks: factor i
joins halves of blocks that lie `2^i` halves apart, as an FFT does.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.weights import stacked_layers


def block_size(skew: jax.Array) -> int:
    """The size b of the blocks that `skew` `[..., b (b - 1) / 2]` parametrizes."""
    return (1 + math.isqrt(1 + 8 * skew.shape[-1])) // 2


def skew_matrix(skew: jax.Array) -> jax.Array:
    """`[..., b, b]` with `skew` `[..., b (b - 1) / 2]` above the diagonal, row by row, and its negative below."""
    b = block_size(skew)
    rows, columns = np.triu_indices(b, 1)
    upper = jnp.zeros((*skew.shape[:-1], b, b), skew.dtype).at[..., rows, columns].set(skew)
    return upper - jnp.swapaxes(upper, -1, -2)


def cayley(skew: jax.Array, terms: int = 0) -> jax.Array:
    """The Cayley transform `(I + Q) (I - Q)^-1` of each skew-symmetric Q, `[..., b, b]`, in float32 or wider.

    With `terms`, the sum `I + 2 (Q + ... + Q^(terms - 2)) + Q^(terms - 1)` approximates it without an inverse. The sum
    is nearly orthogonal for small Q only.
    """
    q = skew_matrix(skew.astype(jnp.promote_types(skew.dtype, jnp.float32)))
    eye = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
    if not terms:
        return stacked_layers.apply_per_matrix(jnp.linalg.solve, eye - q, eye + q)
    total, power = eye, q
    for _ in range(terms - 2):
        total, power = total + 2 * power, jnp.matmul(power, q, precision="highest")
    return total + power


def rotate(x: jax.Array, blocks: jax.Array, transpose: bool = False, precision: str | None = None) -> jax.Array:
    """`x @ R` (or `x @ R.T`) for `x` `[..., n]` and `blocks` `[f, n / b, b, b]`, in the dtype of `x`.

    `R = B_f ... B_1`, where B_1 is the block-diagonal matrix of `blocks[0]`.
    """
    factors = range(len(blocks))
    for i in factors if transpose else reversed(factors):
        x = _factor(x, jnp.swapaxes(blocks[i], -1, -2) if transpose else blocks[i], 2**i, precision)
    return x


def _factor(x: jax.Array, blocks: jax.Array, apart: int, precision: str | None) -> jax.Array:
    """The product with one factor, each of whose blocks acts on two halves that lie `apart` halves from each other."""
    count, b, _ = blocks.shape
    rows = x.reshape(*x.shape[:-1], count // apart, 2, apart, b // 2) if apart > 1 else x
    rows = (jnp.swapaxes(rows, -3, -2) if apart > 1 else rows).reshape(*x.shape[:-1], count, b)
    y = jnp.einsum("...ki,kij->...kj", rows, blocks.astype(x.dtype), precision=precision)
    if apart > 1:
        y = jnp.swapaxes(y.reshape(*x.shape[:-1], count // apart, apart, 2, b // 2), -3, -2)
    return y.reshape(x.shape)
