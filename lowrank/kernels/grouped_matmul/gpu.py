"""The grouped product on a GPU: a fixed number of steps, each of which multiplies one block of one group's rows.

A GPU waits for the host at every turn of a loop whose length depends on the data, so the number of steps is the
largest that any sizes need. A block has `BLOCK` rows. The last block of a group runs into the rows of the next group,
which then writes its own values there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.kernels import half_precision_matmul

BLOCK = 128  # rows


class Steps(NamedTuple):
    """For each of the N = R / BLOCK + G steps: its group, its first row, and the row at which its group ends."""

    group: jax.Array
    start: jax.Array
    stop: jax.Array


def plan_steps(sizes: jax.Array, rows: int) -> Steps:
    """The steps for groups of these sizes; steps that are not needed work on the padding behind the last row."""
    counts, ends = -(-sizes // BLOCK), jnp.cumsum(sizes)
    after = jnp.cumsum(counts)
    i = jnp.arange(rows // BLOCK + len(sizes))
    group = jnp.minimum(jnp.searchsorted(after, i, side="right"), len(sizes) - 1)
    start = (ends - sizes)[group] + (i - (after - counts)[group]) * BLOCK
    return Steps(group, jnp.where(i < after[-1], start, rows), ends[group])


def multiply_rows(x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int, dtype: Any) -> jax.Array:
    """`x[i]` times `w[g]`, summed over the axis `contracted` of `w[g]`, in `dtype`.

    Rows beyond the last group hold any values.
    """
    rows, steps = len(x), plan_steps(sizes, len(x))
    x = jnp.pad(x, ((0, BLOCK), (0, 0)))

    def write_block(i: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, steps.start[i], BLOCK)
        part = half_precision_matmul.matmul_in(dtype, part, w[steps.group[i]], contracted)
        return jax.lax.dynamic_update_slice_in_dim(out, part, steps.start[i], 0)

    out = jnp.zeros((len(x), w.shape[2 - contracted]), dtype)
    return jax.lax.fori_loop(0, len(steps.group), write_block, out)[:rows]


def kernel_gradients(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x.T @ g` `[G, in, out]` over the rows of each group, summed in float32."""
    steps = plan_steps(sizes, len(x))
    x, g = (jnp.pad(a, ((0, BLOCK), (0, 0))) for a in (x, g))

    def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
        a, b = (jax.lax.dynamic_slice_in_dim(v, steps.start[i], BLOCK) for v in (x, g))
        a = jnp.where((steps.start[i] + jnp.arange(BLOCK) < steps.stop[i])[:, None], a, 0)
        return total.at[steps.group[i]].add(jnp.matmul(a.T, b, preferred_element_type=total.dtype))

    total = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.fori_loop(0, len(steps.group), add_block, total).astype(x.dtype)
