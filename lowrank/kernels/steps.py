"""The grouped product in a number of steps that is known beforehand, each of one block of one group's rows: for GPUs.

A GPU's loop whose end only the data tell waits for the host at every turn. Shapes as in `grouped`; a block is of
`BLOCK` rows, and the last one of a group runs into the next group's, which then writes its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank.kernels import rounded

BLOCK = 128  # rows


class Steps(NamedTuple):
    """Of each of the N = R / BLOCK + G steps: its group, its first row, and the row that its group ends before."""

    group: jax.Array
    start: jax.Array
    stop: jax.Array


def planned(sizes: jax.Array, rows: int) -> Steps:
    """The steps for groups of these sizes; those that are left over are of rows beyond the last."""
    counts, ends = -(-sizes // BLOCK), jnp.cumsum(sizes)
    after = jnp.cumsum(counts)
    i = jnp.arange(rows // BLOCK + len(sizes))
    group = jnp.minimum(jnp.searchsorted(after, i, side="right"), len(sizes) - 1)
    start = (ends - sizes)[group] + (i - (after - counts)[group]) * BLOCK
    return Steps(group, jnp.where(i < after[-1], start, rows), ends[group])


def rows(x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int) -> jax.Array:
    """`x[i]` times `w[g]` summed over its axis `contracted`; beyond the last group, anything."""
    n, steps = len(x), planned(sizes, len(x))
    x = jnp.pad(x, ((0, BLOCK), (0, 0)))

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, steps.start[i], BLOCK)
        part = rounded.dot(part, w[steps.group[i]], contracted)
        return jax.lax.dynamic_update_slice_in_dim(out, part, steps.start[i], 0)

    out = jnp.zeros((len(x), w.shape[2 - contracted]), x.dtype)
    return jax.lax.fori_loop(0, len(steps.group), one, out)[:n]


def kernels(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x.T @ g` `[G, in, out]` over the rows of each group, summed in float32."""
    steps = planned(sizes, len(x))
    x, g = (jnp.pad(a, ((0, BLOCK), (0, 0))) for a in (x, g))

    def one(i: jax.Array, total: jax.Array) -> jax.Array:
        a, b = (jax.lax.dynamic_slice_in_dim(v, steps.start[i], BLOCK) for v in (x, g))
        a = jnp.where((steps.start[i] + jnp.arange(BLOCK) < steps.stop[i])[:, None], a, 0)
        return total.at[steps.group[i]].add(jnp.matmul(a.T, b, preferred_element_type=total.dtype))

    total = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.fori_loop(0, len(steps.group), one, total).astype(x.dtype)
