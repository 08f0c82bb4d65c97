"""The grouped product for the platform that a program is compiled for.

On TPUs, `jax.lax.ragged_dot` is a kernel of its own. Elsewhere it multiplies every row by the matrix of every group,
which is G times the work, and on a GPU it first writes the rows G times. Multiplying blocks of rows that belong to one
group takes little more than the work of each row's own product.
"""

import jax

from lowrank.kernels.dispatch import Operation
from lowrank.kernels.grouped_matmul import cpu, gpu
from lowrank.kernels.grouped_matmul.gradient import differentiable

ragged_dot_in_blocks = differentiable(cpu.multiply_rows, cpu.kernel_gradients)
ragged_dot_in_steps = differentiable(gpu.multiply_rows, gpu.kernel_gradients)
PLAIN = {
    "cpu": ragged_dot_in_blocks,
    "cuda": ragged_dot_in_steps,
    "rocm": ragged_dot_in_steps,
    "default": jax.lax.ragged_dot,
}
_OPERATION = Operation("grouped_matmul", xla=PLAIN)


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: str = "auto") -> jax.Array:
    """`x[i] @ w[g]` `[R, out]`: the first `sizes[0]` rows of `x` belong to group 0, the next `sizes[1]` to group 1.

    Rows beyond the sum of `sizes` are zero in the result.
    """
    return _OPERATION(x, w, sizes, implementation=implementation)
