"""The product on a TPU: a tile of rows stays in VMEM, where both products of a tile of the result are added.

The rows are read once, where the form in plain JAX reads them for `x A` too. A tile takes all inputs of the kernel, so
that the columns of the kernel are read again for each tile of rows, unless VMEM holds them all. In a scan over layers
the compiler copies each layer's kernel for this body, and so the form in plain JAX moves fewer bytes there. The speed
is not measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank.core.errors import UserError, plural
from lowrank.kernels.lora_matmul.plain import Pair, Parts

CHUNK, WIDTH = 256, 512  # rows and columns of a tile that are multiplied at a time
TILES = [(rows, columns) for rows in (2048, 1024, 512, 256) for columns in (1024, 512, 256)]
WHOLE = 512  # rows of a tile beside a kernel that VMEM holds whole
SUBLANES = 16  # ranks are padded to a multiple: the rows of a register of bfloat16
VMEM = 100 * 2**20  # bytes; a v5e and a v6e have 128 MiB
DTYPES = (jnp.bfloat16, jnp.float32)


def check(dtype: Any) -> None:
    """Raises UserError unless a TPU multiplies arrays of this dtype."""
    if dtype not in DTYPES:
        raise UserError(f"implementation='pallas_tpu' of lora_matmul takes bfloat16 or float32, not {dtype}: use 'xla'")


def multiply(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, dtype: Any, interpret: bool = False
) -> Pair:
    """`x W + t B` in `dtype`, and `t = s (x A)` in the dtype of `x`."""
    return _multiply(x, w, a, b, scale, 0, dtype, interpret)


def gradient(
    g: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, interpret: bool = False
) -> Parts:
    """Zero, `g W^T + u A^T` and `u = s (g B^T)`, in the dtype of `g`."""
    dx, u = _multiply(g, w, b, a, scale, 1, g.dtype, interpret)
    return jnp.zeros_like(dx), dx, u


def _multiply(x: Any, w: Any, down: Any, up: Any, scale: Any, axis: int, dtype: Any, interpret: bool) -> Pair:
    """The product that sums over the axis `axis` of the kernel and of both factors, of which `down` is the first."""
    lead, ranks = x.shape[:-1], down.shape[1 - axis]
    x = x.reshape(-1, x.shape[-1])
    w = w if w.dtype == jnp.bfloat16 else w.astype(x.dtype)
    pad = lambda factor, at: jnp.pad(  # noqa: E731
        factor.astype(x.dtype), [(0, -ranks % SUBLANES) if i == at else (0, 0) for i in range(2)]
    )
    y, t = _tiled(x, w, pad(down, 1 - axis), pad(up, axis), scale, axis, dtype, interpret)
    return y.reshape(*lead, -1), t[:, :ranks].reshape(*lead, ranks)


def _tiled(x: Any, w: Any, down: Any, up: Any, scale: Any, axis: int, dtype: Any, interpret: bool) -> Any:
    (rows, inputs), out, ranks = x.shape, w.shape[1 - axis], down.shape[1 - axis]
    tile, columns = _tile_sizes(rows, inputs, out, x.dtype.itemsize, jnp.dtype(dtype).itemsize)
    grid = pl.cdiv(rows, tile), pl.cdiv(out, columns)
    reads = 1 if grid[1] == 1 else grid[0]
    moved = x.nbytes + reads * (w.nbytes + up.nbytes) + down.nbytes + rows * out * jnp.dtype(dtype).itemsize
    cut = lambda n: (n, columns) if axis == 0 else (columns, n)  # noqa: E731
    at = lambda i, j: (0, j) if axis == 0 else (j, 0)  # noqa: E731
    once = {"pipeline_mode": pl.Buffered(1)} if grid[1] == 1 else {}
    return pl.pallas_call(
        functools.partial(_step, axis, min(tile, CHUNK)),
        out_shape=[jax.ShapeDtypeStruct((rows, out), dtype), jax.ShapeDtypeStruct((rows, ranks), x.dtype)],
        grid=grid,
        in_specs=[
            pl.BlockSpec((1, 1), lambda i, j: (0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((tile, inputs), lambda i, j: (i, 0)),
            pl.BlockSpec(cut(inputs), at, **once),
            pl.BlockSpec(down.shape, lambda i, j: (0, 0)),
            pl.BlockSpec(cut(ranks), at, **once),
        ],
        out_specs=[
            pl.BlockSpec((tile, columns), lambda i, j: (i, j)),
            pl.BlockSpec((tile, ranks), lambda i, j: (i, 0)),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * (inputs * out + ranks * (inputs + out)), bytes_accessed=moved, transcendentals=0
        ),
        interpret=interpret,
    )(scale.astype(jnp.float32).reshape(1, 1), x, w, down, up)


def _tile_sizes(rows: int, inputs: int, out: int, size: int, out_size: int) -> tuple[int, int]:
    """The rows and columns of a tile: all columns where VMEM holds the kernel, or else the most rows that fit."""
    unit = SUBLANES if rows <= CHUNK else CHUNK
    padded = -(-rows // unit) * unit
    whole = inputs * out * size + 2 * WHOLE * (inputs * size + out * out_size) + 4 * CHUNK * out
    if whole <= VMEM * 0.9:
        return min(WHOLE, padded), out
    for tile, columns in TILES:
        used = 2 * (tile * inputs + inputs * columns) * size + 2 * tile * columns * out_size + 4 * CHUNK * columns
        if used <= VMEM * 0.9 and (tile <= padded or tile == CHUNK):
            return min(tile, padded), min(columns, out)
    raise UserError(
        f"a kernel of {plural(inputs, 'input')} is too long for the body of lora_matmul for TPUs: "
        "use implementation='xla'"
    )


def _step(axis: int, chunk: int, scale: Any, x: Any, w: Any, down: Any, up: Any, y: Any, t: Any) -> None:
    multiply = lambda x, w: jax.lax.dot_general(  # noqa: E731
        x, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )

    def shrink(i: Any, _: None) -> None:
        rows = pl.ds(i * chunk, chunk)
        t[rows, :] = (multiply(x[rows, :], down[...]) * scale[0, 0]).astype(t.dtype)

    width = WIDTH if y.shape[1] % WIDTH == 0 else y.shape[1]

    def expand(i: Any, _: None) -> None:
        rows = pl.ds(jax.lax.rem(i, chunks) * chunk, chunk)
        columns = pl.ds(jax.lax.div(i, chunks) * width, width)
        parts = (w[:, columns], up[:, columns]) if axis == 0 else (w[columns, :], up[columns, :])
        total = multiply(x[rows, :].astype(w.dtype), parts[0])
        y[rows, columns] = (total + multiply(t[rows, :], parts[1])).astype(y.dtype)

    chunks = x.shape[0] // chunk
    pl.when(pl.program_id(1) == 0)(lambda: jax.lax.fori_loop(0, chunks, shrink, None))
    jax.lax.fori_loop(0, chunks * (y.shape[1] // width), expand, None)
