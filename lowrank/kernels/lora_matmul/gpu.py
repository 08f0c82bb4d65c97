"""The product on a Hopper GPU: one block for each tile of the result, which adds both products in registers.

The product with A, which is short, is left to the compiler. Arrays are padded to whole tiles. The speed is not
measured.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowrank.core.errors import UserError
from lowrank.kernels.lora_matmul import plain
from lowrank.kernels.lora_matmul.plain import Pair, Parts

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile of the result, and the inputs at a time
DTYPES = (jnp.bfloat16, jnp.float16)
UNIT = 16  # ranks are padded to a multiple, and beyond DEPTH to a multiple of that
STAGES = 3  # tiles on their way


def check(dtype: Any) -> None:
    """Raises UserError unless the body multiplies arrays of this dtype."""
    if dtype not in DTYPES:
        raise UserError(f"implementation='pallas_gpu' of lora_matmul takes bfloat16 or float16, not {dtype}: use 'xla'")


def multiply(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, dtype: Any) -> Pair:
    """`x W + t B` in `dtype`, and `t = s (x A)` in the dtype of `x`."""
    t = plain.shrink(x, a, scale)
    return _multiply(x, t, w, b, 0, dtype), t


def gradient(g: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> Parts:
    """Zero, `g W^T + u A^T` and `u = s (g B^T)`, in the dtype of `g`."""
    u = plain.shrink(g, b, scale, 1)
    dx = _multiply(g, u, w, a, 1, g.dtype)
    return jnp.zeros_like(dx), dx, u


def _multiply(x: jax.Array, t: jax.Array, w: jax.Array, up: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The sum of the products of `x` with `w` and of `t` with `up`, both over the axis `axis` of the second."""
    lead, out = x.shape[:-1], w.shape[1 - axis]
    depth = DEPTH if t.shape[-1] > DEPTH else -(-t.shape[-1] // UNIT) * UNIT
    flat = lambda v, n: _padded(v.reshape(-1, v.shape[-1]), (ROWS, n))  # noqa: E731
    tile = lambda v, n: _padded(v.astype(x.dtype), _ordered(axis, n, COLUMNS))  # noqa: E731
    x, w, t, up = flat(x, DEPTH), tile(w, DEPTH), flat(t, depth), tile(up, depth)
    rows, columns = len(x), w.shape[1 - axis]
    product = plgpu.kernel(
        functools.partial(_tile, axis, depth),
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_types=[plgpu.SMEM((ROWS, COLUMNS), dtype)],
        grid=(rows // ROWS, columns // COLUMNS),
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    y: jax.Array = product(x, w, t, up)
    return y[: math.prod(lead), :out].reshape(*lead, out)


def _padded(v: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    return jnp.pad(v, [(0, -n % size) for n, size in zip(v.shape, sizes, strict=True)])


def _ordered(axis: int, summed: Any, kept: Any) -> tuple[Any, Any]:
    """The pair in the order of the axes of a kernel whose axis `axis` is summed over."""
    return (summed, kept) if axis == 0 else (kept, summed)


def _tile(axis: int, depth: int, x: Any, w: Any, t: Any, up: Any, y: Any, part: Any) -> None:
    row, column = jax.lax.axis_index("row"), jax.lax.axis_index("column")

    def accumulate(total: Any) -> Any:
        for left, right, size in ((x, w, DEPTH), (t, up, depth)):
            steps = left.shape[1] // size
            behind = min(1, steps - 1)  # products that may still run, and whose tiles are kept, when the next is begun
            plgpu.emit_pipeline(
                functools.partial(_add, axis, behind, total),
                grid=(steps,),
                in_specs=[
                    plgpu.BlockSpec((ROWS, size), lambda k: (row, k), delay_release=behind),
                    plgpu.BlockSpec(
                        _ordered(axis, size, COLUMNS), lambda k: _ordered(axis, k, column), delay_release=behind
                    ),
                ],
                max_concurrent_steps=min(STAGES, steps),
            )(left, right)
            plgpu.wgmma_wait(0)
        return total[...]

    part[...] = pl.run_scoped(accumulate, plgpu.ACC((ROWS, COLUMNS))).astype(part.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(part, y.at[pl.ds(row * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS)])
    plgpu.wait_smem_to_gmem(0)


def _add(axis: int, behind: int, total: Any, _: Any, left: Any, right: Any) -> None:
    plgpu.wgmma(total, left, right if axis == 0 else plgpu.transpose_ref(right, (1, 0)))
    plgpu.wgmma_wait(behind)
