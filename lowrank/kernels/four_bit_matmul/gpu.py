"""The product on a Hopper GPU: tiles of codes are decoded into shared memory, from which the tensor cores read them.

A block multiplies a tile of columns, transposed, by all rows of `x`, transposed: the tensor cores take 64 columns at a
time, but as few as 8 rows. Where there are too few tiles to fill the GPU, a block takes a part of the inputs, and the
sums of the parts are added in float32. The speed is not measured.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowrank.kernels.four_bit_matmul.levels import values_of

PACKED, COLUMNS = 64, 128  # of a tile of codes
DTYPES = (jnp.bfloat16, jnp.float16)
NARROW = 64  # columns of a tile are decoded at a time, so that they fit into registers
STAGES = 3  # tiles on their way
BLOCKS = 264  # that an H100 runs at a time: two on each of its 132 multiprocessors
UNIT = 8  # `x` is padded to a multiple of these rows


def multiply(
    x: jax.Array, codes: jax.Array, scale: jax.Array, *, levels: Sequence[float], block: int, out: Any = None
) -> jax.Array:
    """`x @ (levels[code] * scale)` in the dtype `out`, by default that of `x`.

    The halves of a block are a multiple of 8 rows and a power of two, and `x` has at most 64 rows in half precision.
    """
    rows, (packed, columns), half = len(x), codes.shape, block // 2
    x = jnp.pad(x, ((0, -rows % UNIT), (0, 2 * packed - x.shape[1])))
    missing, right = -packed % PACKED, -columns % COLUMNS
    halves = x.reshape(len(x), -1, 2, half)
    low, high = (jnp.pad(halves[:, :, i].reshape(len(x), packed), ((0, 0), (0, missing))) for i in range(2))
    codes = jnp.pad(codes, ((0, missing), (0, right)))
    scale = jnp.pad(scale.astype(jnp.float32), ((0, len(codes) // half - len(scale)), (0, right)))
    steps, tiles = len(codes) // PACKED, codes.shape[1] // COLUMNS
    parts = max(n for n in range(1, steps + 1) if steps % n == 0 and (n == 1 or n * tiles <= BLOCKS))
    product = plgpu.kernel(
        functools.partial(_column, tuple(levels), half, steps // parts),
        out_type=jax.ShapeDtypeStruct((parts, codes.shape[1], len(x)), jnp.float32),
        scratch_types=[plgpu.SMEM((2, PACKED, COLUMNS), x.dtype), plgpu.SMEM((COLUMNS, len(x)), jnp.float32)],
        grid=(tiles, parts),
        grid_names=("column", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return jnp.sum(product(low, high, codes, scale), axis=0)[:columns, :rows].T.astype(out or x.dtype)


def _column(
    levels: Sequence[float],
    half: int,
    steps: int,
    low: Any,
    high: Any,
    codes: Any,
    scale: Any,
    out: Any,
    w: Any,
    y: Any,
) -> None:
    """The sums of one part of the inputs for one tile of columns; `w` and `y` are shared memory."""
    column, part = jax.lax.axis_index("column"), jax.lax.axis_index("part")
    spans = max(1, PACKED // half)  # the scales of a column in a tile of codes
    step = lambda k: part * steps + k  # noqa: E731
    across = plgpu.BlockSpec((low.shape[0], PACKED), lambda k: (0, step(k)))
    down = plgpu.BlockSpec((PACKED, COLUMNS), lambda k: (step(k), column))
    scales = plgpu.BlockSpec((spans, COLUMNS), lambda k: (step(k) * PACKED // (half * spans), column))

    def accumulate(total: Any) -> Any:
        pipeline = plgpu.emit_pipeline(
            functools.partial(_tile, levels, half, w, total),
            grid=(steps,),
            in_specs=[across, across, down, scales],
            max_concurrent_steps=min(STAGES, steps),
        )
        pipeline(low, high, codes, scale)
        return total[...]

    y[...] = pl.run_scoped(accumulate, plgpu.ACC(y.shape))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y, out.at[part, pl.ds(column * COLUMNS, COLUMNS)])
    plgpu.wait_smem_to_gmem(0)


def _tile(
    levels: Sequence[float], half: int, w: Any, total: Any, _: Any, low: Any, high: Any, codes: Any, scale: Any
) -> None:
    for left in range(0, COLUMNS, NARROW):
        columns = pl.ds(left, NARROW)
        packed = plgpu.layout_cast(codes[:, columns], plgpu.Layout.WGMMA).astype(jnp.int32)
        spread = _spread(scale, columns, half)
        for i, code in enumerate((packed & 15, packed >> 4)):
            w[i, :, columns] = (values_of(code, levels) * spread).astype(w.dtype)
    plgpu.commit_smem()
    for i, x in enumerate((low, high)):
        plgpu.wgmma(total, plgpu.transpose_ref(w.at[i], (1, 0)), plgpu.transpose_ref(x, (1, 0)))
    plgpu.wgmma_wait(0)


def _spread(scale: Any, columns: Any, half: int) -> Any:
    """The scale of each entry of some columns of a tile of codes, whose rows share scales in groups of `half`."""
    shape, line = (PACKED, NARROW), plgpu.Layout.WGMMA.reduce(0)
    lines = [
        jax.lax.broadcast_in_dim(plgpu.layout_cast(scale[i, columns], line), shape, (1,))
        for i in range(max(1, PACKED // half))
    ]
    spread = lines[0]
    for i, values in enumerate(lines[1:], 1):
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        spread = jnp.where(row < i * half, spread, values)
    return spread
