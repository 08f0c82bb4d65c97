"""The grouped product for the platform that a program is compiled for.

On TPUs, `jax.lax.ragged_dot` is a kernel of its own. Elsewhere it multiplies every row by the matrix of every group,
which is G times the work, and on a GPU it first writes the rows G times. Multiplying blocks of rows that belong to one
group takes little more than the work of each row's own product.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.kernels.dispatch import Operation
from lowrank.kernels.grouped_matmul import cpu, gpu
from lowrank.kernels.grouped_matmul.gradient import differentiable

ragged_dot_in_blocks = differentiable(cpu.multiply_rows, cpu.kernel_gradients)
ragged_dot_in_steps = differentiable(gpu.multiply_rows, gpu.kernel_gradients)


def _whole(x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.ragged_dot(x, w, sizes) if dtype == x.dtype else _whole_to_float32(x, w, sizes)


@jax.custom_vjp
def _whole_to_float32(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)


def _backward(residuals: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """The gradient is rounded to the dtype of `x` before it is multiplied."""
    x, w, sizes = residuals
    dx, dw = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)[1](g.astype(x.dtype))
    return dx, dw, None


_whole_to_float32.defvjp(lambda x, w, sizes: (_whole_to_float32(x, w, sizes), (x, w, sizes)), _backward)
PLAIN = {
    "cpu": ragged_dot_in_blocks,
    "cuda": ragged_dot_in_steps,
    "rocm": ragged_dot_in_steps,
    "default": _whole,
}
_OPERATION = Operation("grouped_matmul", xla=PLAIN)


def ragged_dot(
    x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: Any = None, implementation: str = "auto"
) -> jax.Array:
    """`x[i] @ w[g]` `[R, out]`: the first `sizes[0]` rows of `x` belong to group 0, the next `sizes[1]` to group 1.

    Rows beyond the sum of `sizes` are zero in the result. Its dtype is that of `x`, or float32 if `dtype` says so.
    """
    return _OPERATION(x, w, sizes, dtype=x.dtype if dtype is None else dtype, implementation=implementation)
