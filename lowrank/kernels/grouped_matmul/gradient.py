"""The gradient of a grouped product, given a product of the rows and a sum for each group's matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MultiplyRows = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]  # (x, w, sizes, contracted) -> rows
KernelGradients = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, g, sizes) -> [G, in, out]
GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, w, sizes) -> [R, out]


def differentiable(multiply_rows: MultiplyRows, kernel_gradients: KernelGradients) -> GroupedMatmul:
    """The grouped product `(x, w, sizes) -> [R, out]`, differentiable in reverse mode only.

    Args:
      multiply_rows: `x[i]` times `w[g]`, summed over the axis `contracted` (0 or 1) of `w[g]`; any values are allowed
        in the rows beyond the last group.
      kernel_gradients: `x.T @ g` `[G, in, out]` over the rows of each group.
    """

    def masked(x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int) -> jax.Array:
        in_a_group = jnp.arange(len(x)) < jnp.sum(sizes)
        return jnp.where(in_a_group[:, None], multiply_rows(x, w, sizes, contracted), 0)

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return masked(x, w, sizes, 0)

    def backward(residuals: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        x, w, sizes = residuals
        return masked(g, w, sizes, 1), kernel_gradients(x, g, sizes), None

    product.defvjp(lambda x, w, sizes: (product(x, w, sizes), (x, w, sizes)), backward)
    return product
