"""The product on a TPU: tiles of codes are decoded in VMEM, beside which all rows stay. The speed is not measured."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank.kernels.four_bit_matmul.levels import values_of

ROWS, COLUMNS = 512, 512  # of a tile of codes
SUBLANES = 16  # rows are padded to a multiple: the rows of a register of bfloat16


def is_whole(rows: int, codes: tuple[int, ...]) -> bool:
    """Whether rows, and codes of this shape, are multiplied without padding."""
    return rows % SUBLANES == 0 and codes[0] % ROWS == 0


def multiply(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    *,
    levels: Sequence[float],
    block: int,
    out: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """`x @ (levels[code] * scale)` in the dtype `out`, by default that of `x`.

    The halves of a block are a multiple of 8 rows and divide a tile.
    """
    rows, (packed, columns), dtype = len(x), codes.shape, jnp.dtype(out or x.dtype)
    x = jnp.pad(x, ((0, -rows % SUBLANES), (0, 2 * packed - x.shape[1])))
    halves = x.reshape(len(x), -1, 2, block // 2)
    missing = -packed % ROWS
    low, high = (jnp.pad(halves[:, :, i].reshape(len(x), packed), ((0, 0), (0, missing))) for i in range(2))
    codes = jnp.pad(codes, ((0, missing), (0, 0)))
    scale = jnp.pad(scale.astype(jnp.float32), ((0, len(codes) // (block // 2) - len(scale)), (0, 0)))
    moved = 2 * low.nbytes + codes.nbytes + scale.nbytes + len(x) * columns * dtype.itemsize
    across, down = lambda j, k: (0, k), lambda j, k: (k, j)
    y = pl.pallas_call(
        functools.partial(_tile, tuple(levels), block // 2),
        out_shape=jax.ShapeDtypeStruct((len(x), columns), dtype),
        grid=(pl.cdiv(columns, COLUMNS), len(codes) // ROWS),
        in_specs=[
            pl.BlockSpec((len(x), ROWS), across),
            pl.BlockSpec((len(x), ROWS), across),
            pl.BlockSpec((ROWS, COLUMNS), down),
            pl.BlockSpec((ROWS // (block // 2), COLUMNS), down),
        ],
        out_specs=pl.BlockSpec((len(x), COLUMNS), lambda j, k: (0, j)),
        scratch_shapes=[pltpu.VMEM((len(x), COLUMNS), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=4 * len(x) * codes.size, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(low, high, codes, scale)
    return y[:rows]


def _tile(
    levels: Sequence[float], half: int, low: Any, high: Any, codes: Any, scale: Any, out: Any, total: Any
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    packed = codes[...].astype(jnp.int32)
    spread = jnp.broadcast_to(scale[...][:, None, :], (len(scale), half, packed.shape[1])).reshape(packed.shape)
    for x, code in ((low, packed & 15), (high, packed >> 4)):
        w = (values_of(code, levels) * spread).astype(x.dtype)
        total[...] += jnp.dot(x[...], w, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)
