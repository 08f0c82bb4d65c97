"""Rows sorted by group, each times the matrix of its group.

Shapes: R rows, G groups. `jax.lax.ragged_dot` is a kernel of its own on TPUs; elsewhere it multiplies every row by
every group's matrix, G times the work, and on a GPU it writes the rows G times over first. Blocks of rows of one group
take about the work once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lowrank.kernels import rounded, steps

BLOCK = 64  # rows, on a CPU


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x[i] @ w[g]` `[R, out]` for `x: [R, in]`, the first `sizes[0]` rows of group 0 and so on, and `w: [G, in, out]`.

    Rows beyond the sum of `sizes` `[G]` are zero.
    """
    return jax.lax.platform_dependent(
        x, w, sizes, cpu=in_blocks, cuda=in_steps, rocm=in_steps, default=jax.lax.ragged_dot
    )


def _rows(x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int) -> jax.Array:
    """`x[i]` times `w[g]` summed over its axis `contracted`.

    A group's last block runs into the rows of the next group, which then writes its own.
    """
    rows, block, starts = len(x), _block(x, sizes), jnp.cumsum(sizes) - sizes
    x = jnp.pad(x, ((0, block), (0, 0)))

    def group(g: jax.Array, out: jax.Array) -> jax.Array:
        kernel, start = w[g], starts[g]

        def one(i: jax.Array, out: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(x, start + i * block, block)
            part = rounded.dot(part, kernel, contracted)
            return jax.lax.dynamic_update_slice_in_dim(out, part, start + i * block, 0)

        return jax.lax.fori_loop(0, -(-sizes[g] // block), one, out)

    out = jnp.zeros((rows + block, w.shape[2 - contracted]), x.dtype)
    return jax.lax.fori_loop(0, len(w), group, out)[:rows]


def _kernels(x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
    """`x.T @ g` `[G, in, out]` over the rows of each group."""
    block = _block(x, sizes)
    x, g = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, g))

    def group(size: jax.Array, start: jax.Array) -> jax.Array:
        def one(i: jax.Array, total: jax.Array) -> jax.Array:
            a, b = (jax.lax.dynamic_slice_in_dim(v, start + i * block, block) for v in (x, g))
            a = jnp.where((i * block + jnp.arange(block) < size)[:, None], a, 0)
            return total + jnp.matmul(a.T, b, preferred_element_type=total.dtype)

        total = jnp.zeros((x.shape[1], g.shape[1]), jnp.promote_types(x.dtype, jnp.float32))
        return jax.lax.fori_loop(0, -(-size // block), one, total).astype(x.dtype)

    return jax.lax.map(lambda of: group(*of), (sizes, jnp.cumsum(sizes) - sizes))


def _block(x: jax.Array, sizes: jax.Array) -> int:
    return min(BLOCK, max(8, -(-len(x) // len(sizes))))


def _product(rows: Callable[..., jax.Array], kernels: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The product with `rows` and its gradient of the matrices with `kernels`, differentiable in reverse mode alone."""

    def masked(x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int) -> jax.Array:
        taken = jnp.arange(len(x)) < jnp.sum(sizes)
        return jnp.where(taken[:, None], rows(x, w, sizes, contracted), 0)

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return masked(x, w, sizes, 0)

    def back(kept: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        x, w, sizes = kept
        return masked(g, w, sizes, 1), kernels(x, g, sizes), None

    product.defvjp(lambda x, w, sizes: (product(x, w, sizes), (x, w, sizes)), back)
    return product


in_blocks = _product(_rows, _kernels)  # as many as there are
in_steps = _product(steps.rows, steps.kernels)  # as many as there may be
