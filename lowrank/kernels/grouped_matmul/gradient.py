"""The gradient of a grouped product, given a product of the rows and a sum for each group's matrix."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MultiplyRows = Callable[
    [jax.Array, jax.Array, jax.Array, int, Any], jax.Array
]  # (x, w, sizes, contracted, dtype) -> rows
KernelGradients = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, g, sizes) -> [G, in, out]
GroupedMatmul = Callable[..., jax.Array]  # (x, w, sizes, dtype or None for that of x) -> [R, out]


def differentiable(multiply_rows: MultiplyRows, kernel_gradients: KernelGradients) -> GroupedMatmul:
    """The grouped product `(x, w, sizes, dtype) -> [R, out]`, differentiable in reverse mode only.

    The gradient is rounded to the dtype of `x` before it is multiplied.

    Args:
      multiply_rows: `x[i]` times `w[g]`, summed over the axis `contracted` (0 or 1) of `w[g]`, in a dtype; any values
        are allowed in the rows beyond the last group.
      kernel_gradients: `x.T @ g` `[G, in, out]` over the rows of each group.
    """

    def masked(x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int, dtype: Any) -> jax.Array:
        in_a_group = jnp.arange(len(x)) < jnp.sum(sizes)
        return jnp.where(in_a_group[:, None], multiply_rows(x, w, sizes, contracted, dtype), 0)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
        return masked(x, w, sizes, 0, dtype)

    def backward(dtype: Any, residuals: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        del dtype
        x, w, sizes = residuals
        g = g.astype(x.dtype)
        return masked(g, w, sizes, 1, x.dtype), kernel_gradients(x, g, sizes), None

    product.defvjp(lambda x, w, sizes, dtype: (product(x, w, sizes, dtype), (x, w, sizes)), backward)
    return lambda x, w, sizes, dtype=None: product(x, w, sizes, x.dtype if dtype is None else dtype)
