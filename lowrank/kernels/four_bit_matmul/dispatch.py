"""The product of few rows with a kernel in four bits, and the gradient of the rows, for which it is decoded again."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError
from lowrank.kernels.dispatch import Operation
from lowrank.kernels.four_bit_matmul import gpu, plain, tpu

_OPERATION = Operation("four_bit_matmul", xla=plain.multiply, pallas_tpu=tpu.multiply, pallas_gpu=gpu.multiply)
LEVELS, UNIT = 16, 16  # the levels of a code, and what divides a block whose halves fill a TPU's registers


def four_bit_matmul(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    levels: Sequence[float],
    block: int,
    implementation: str = "auto",
) -> jax.Array:
    """`x @ W` `[M, out]` for the frozen kernel of `codes` and `scale`, in the dtype of `x`.

    Raises UserError unless there are 16 levels, and unless a named body can take blocks of this size and these rows.
    """
    if len(levels) != LEVELS:
        raise UserError(f"a code of four bits needs 16 levels, not {len(levels)}: give one for each code")
    body = implementation not in ("auto", "xla")
    if body and (block % UNIT or tpu.ROWS % (block // 2)):
        raise UserError(
            f"implementation={implementation!r} takes blocks of 16 to 1024 rows that are a power of two, not "
            f"{block}: use 'xla'"
        )
    if implementation == "pallas_gpu":
        gpu.check(len(x), x.dtype)
    return _product(implementation, tuple(levels), block, x, codes, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(implementation: str, levels: tuple[float, ...], block: int, x: Any, codes: Any, scale: Any) -> jax.Array:
    return _OPERATION(x, codes, scale, levels=levels, block=block, implementation=implementation)


def _forward(
    implementation: str, levels: tuple[float, ...], block: int, x: Any, codes: Any, scale: Any
) -> tuple[jax.Array, Any]:
    y = _product(implementation, levels, block, x, codes, scale)
    return y, (jnp.zeros((0, x.shape[1]), x.dtype), codes, scale)


def _backward(implementation: str, levels: tuple[float, ...], block: int, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    none, codes, scale = saved
    w = plain.decode(codes, scale, levels, block)[: none.shape[1]].astype(g.dtype)
    dx = jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(g.dtype), np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scale)


_product.defvjp(_forward, _backward)
