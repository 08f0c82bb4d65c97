"""The grouped product on a CPU: a loop over the blocks of each group's rows, whose length the data decides."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.kernels import half_precision_matmul

BLOCK = 64  # the largest number of rows that are multiplied at a time


def multiply_rows(x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int, dtype: Any) -> jax.Array:
    """`x[i]` times `w[g]`, summed over the axis `contracted` of `w[g]`, in `dtype`.

    The last block of a group runs into the rows of the next group, which then writes its own values there.
    """
    rows, block, starts = len(x), _block_size(x, sizes), jnp.cumsum(sizes) - sizes
    x = jnp.pad(x, ((0, block), (0, 0)))

    def add_group(g: jax.Array, out: jax.Array) -> jax.Array:
        kernel, start = w[g], starts[g]

        def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(x, start + i * block, block)
            part = half_precision_matmul.matmul_in(dtype, part, kernel, contracted)
            return jax.lax.dynamic_update_slice_in_dim(out, part, start + i * block, 0)

        return jax.lax.fori_loop(0, -(-sizes[g] // block), add_block, out)

    out = jnp.zeros((rows + block, w.shape[2 - contracted]), dtype)
    return jax.lax.fori_loop(0, len(w), add_group, out)[:rows]


def kernel_gradients(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x.T @ g` `[G, in, out]` over the rows of each group, summed in float32."""
    block = _block_size(x, sizes)
    x, g = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, g))

    def group_gradient(size: jax.Array, start: jax.Array) -> jax.Array:
        def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
            a, b = (jax.lax.dynamic_slice_in_dim(v, start + i * block, block) for v in (x, g))
            a = jnp.where((i * block + jnp.arange(block) < size)[:, None], a, 0)
            return total + jnp.matmul(a.T, b, preferred_element_type=total.dtype)

        total = jnp.zeros((x.shape[1], g.shape[1]), jnp.promote_types(x.dtype, jnp.float32))
        return jax.lax.fori_loop(0, -(-size // block), add_block, total).astype(x.dtype)

    return jax.lax.map(lambda group: group_gradient(*group), (sizes, jnp.cumsum(sizes) - sizes))


def _block_size(x: jax.Array, sizes: jax.Array) -> int:
    return min(BLOCK, max(8, -(-len(x) // len(sizes))))
