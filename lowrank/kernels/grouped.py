"""Rows sorted by group, each times the matrix of its group.

Shapes: R rows, G groups, B rows a block, N blocks. `jax.lax.ragged_dot` is a kernel of its own on GPUs and TPUs; on a
CPU it multiplies every row by every group's matrix, G times the work, and `in_blocks` about once.
"""

import jax
import jax.numpy as jnp

BLOCK = 64  # rows


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x[i] @ w[g]` `[R, out]` for `x: [R, in]`, the first `sizes[0]` rows of group 0 and so on, and `w: [G, in, out]`.

    Rows beyond the sum of `sizes` `[G]` are zero.
    """
    return jax.lax.platform_dependent(x, w, sizes, cpu=in_blocks, default=jax.lax.ragged_dot)


def in_blocks(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """The same, in blocks of rows of one group; the last block of a group is filled up with zeros."""
    rows, groups = x.shape[0], w.shape[0]
    block = min(BLOCK, max(8, -(-rows // groups)))
    blocks = jnp.arange(min(-(-rows // block) + groups, rows))  # as many as there may be
    ends = jnp.cumsum(-(-sizes // block))
    group_N = jnp.minimum(jnp.searchsorted(ends, blocks, side="right"), groups - 1)
    before_N = blocks - (ends - -(-sizes // block))[group_N]
    place_NxB = before_N[:, None] * block + jnp.arange(block)[None, :]  # within the group
    first_N = (jnp.cumsum(sizes) - sizes)[group_N]
    row_NxB = jnp.where(place_NxB < sizes[group_N][:, None], first_N[:, None] + place_NxB, rows)
    x_NxBxI = jnp.take(x, row_NxB, axis=0, mode="fill", fill_value=0)
    y_NxBxO = jax.lax.map(lambda pair: pair[0] @ w[pair[1]], (x_NxBxI, group_N))
    out = jnp.zeros((rows, w.shape[-1]), x.dtype)
    return out.at[row_NxB.reshape(-1)].set(y_NxBxO.reshape(-1, w.shape[-1]), mode="drop")
