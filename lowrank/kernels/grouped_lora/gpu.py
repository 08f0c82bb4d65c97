"""The grouped low-rank product on a Hopper GPU: one block for each adapter and each tile of sorted rows it has rows in.

A block multiplies the tile's rows by the adapter's `a`, keeps the result in shared memory, and multiplies it by `b` a
tile of columns at a time. A tile that adapters share is multiplied once for each of them, and each block stores only
the rows of its own adapter. The speed is not measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowrank.core.errors import UserError
from lowrank.kernels.grouped_lora.plain import sort_keys
from lowrank.kernels.grouped_lora.steps import plan_steps

ROWS, DEPTH, COLUMNS = 64, 64, 64  # of a tile: rows, inputs at a time, and outputs at a time
DTYPES, RANKS = (jnp.bfloat16, jnp.float16), 512  # a block of `b` of more ranks leaves no room in shared memory
UNIT, CHUNK = 16, 64  # ranks are padded to a multiple of the first, and beyond a chunk to a multiple of chunks
STAGES = 4  # tiles on their way


def check(dtype: Any, ranks: int) -> None:
    """Raises UserError unless the body multiplies arrays of this dtype and rank."""
    if dtype not in DTYPES or ranks > RANKS:
        raise UserError(
            f"implementation='pallas_gpu' of grouped_lora takes bfloat16 or float16 and ranks to {RANKS}, not {dtype} "
            f"and {ranks}: use 'xla'"
        )


def multiply(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array) -> jax.Array:
    """`scale[id] * (x @ a[id].T) @ b[id]` of each row."""
    rows, adapters, out = len(x), len(a), b.shape[2]
    keys = sort_keys(ids, adapters)
    order = jnp.argsort(keys, stable=True)
    padded = (0, -rows % ROWS)
    sorted_keys = jnp.pad(keys[order], padded, constant_values=adapters)
    sorted_x = jnp.pad(x[jnp.pad(order, padded)], ((0, 0), (0, -x.shape[1] % DEPTH)))
    ranks = -a.shape[1] % (UNIT if a.shape[1] <= CHUNK else CHUNK)
    pad = lambda w, tile: jnp.pad(w.astype(x.dtype), ((0, 0), (0, ranks), (0, -w.shape[2] % tile)))  # noqa: E731
    y = _multiply_sorted(sorted_x, pad(a, DEPTH), pad(b, COLUMNS), scale.astype(jnp.float32), sorted_keys)
    return jnp.where((keys < adapters)[:, None], y[jnp.argsort(order), :out], 0)


def _multiply_sorted(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, keys: jax.Array) -> Any:
    """The result of padded arrays; rows without an adapter hold any values."""
    adapters, ranks, _ = a.shape
    group, tile = plan_steps(keys, adapters, ROWS)
    first, end = (
        jnp.searchsorted(keys, group, side=side).astype(jnp.int32) - tile * ROWS for side in ("left", "right")
    )
    begin, stop = jnp.maximum(first, 0), jnp.minimum(end, ROWS)
    count = jnp.where(group < adapters, stop - begin, 0)
    product = plgpu.kernel(
        _step,
        out_type=jax.ShapeDtypeStruct((len(x), b.shape[2]), x.dtype),
        scratch_types=[plgpu.SMEM((ROWS, ranks), x.dtype), plgpu.SMEM((ROWS, COLUMNS), x.dtype)],
        grid=(len(group),),
        grid_names=("step",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return product(x, a, b, scale, jnp.minimum(group, adapters - 1), tile, begin, count)


def _step(
    x: Any, a: Any, b: Any, scale: Any, group: Any, tile: Any, begin: Any, count: Any, y: Any, low: Any, part: Any
) -> None:
    """One adapter on one tile of rows, of which `count` from `begin` on are its own."""
    step = jax.lax.axis_index("step")
    own, block, first, rows = group[step], tile[step], begin[step], count[step]

    @pl.when(rows > 0)
    def _() -> None:
        for start in range(0, a.shape[1], CHUNK):
            _shrink(x, a.at[own], scale[own], block, start, low)
        plgpu.commit_smem()

        def expand(index: Any, b: Any) -> None:
            value = _accumulated(lambda total: plgpu.wgmma(total, low, b), COLUMNS)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            part[...] = value.astype(part.dtype)
            plgpu.commit_smem()
            columns = pl.ds(index[0] * COLUMNS, COLUMNS)
            _store(part, y.at[pl.ds(block * ROWS, ROWS), columns], first, rows)

        tiles = b.shape[2] // COLUMNS
        spec = plgpu.BlockSpec((a.shape[1], COLUMNS), lambda j: (0, j))
        plgpu.emit_pipeline(expand, grid=(tiles,), in_specs=[spec], max_concurrent_steps=min(2, tiles))(b.at[own])
        plgpu.wait_smem_to_gmem(0)


def _shrink(x: Any, a: Any, scale: Any, block: Any, start: int, low: Any) -> None:
    """`scale * x @ a.T` of a tile of rows, for the chunk of ranks from `start` on, into `low`."""
    ranks, steps = min(CHUNK, a.shape[0]), x.shape[1] // DEPTH
    behind = min(1, steps - 1)  # products that may still run, and whose tiles are kept, when the next is begun

    def multiply_tile(total: Any, _: Any, x: Any, a: Any) -> None:
        plgpu.wgmma(total, x, plgpu.transpose_ref(a, (1, 0)))
        plgpu.wgmma_wait(behind)

    def accumulate(total: Any) -> None:
        plgpu.emit_pipeline(
            functools.partial(multiply_tile, total),
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec((ROWS, DEPTH), lambda k: (block, k), delay_release=behind),
                plgpu.BlockSpec((ranks, DEPTH), lambda k: (start // CHUNK, k), delay_release=behind),
            ],
            max_concurrent_steps=min(STAGES, steps),
        )(x, a)

    low[:, pl.ds(start, ranks)] = (_accumulated(accumulate, ranks) * scale).astype(low.dtype)


def _accumulated(accumulate: Any, columns: int) -> Any:
    """The sums in float32 of the products that `accumulate` adds to a reference that holds zeros."""

    def run(total: Any) -> Any:
        accumulate(total)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, columns)))


def _store(part: Any, y: Any, first: Any, rows: Any) -> None:
    """Copies rows whose number is known at run time only: a copy for each bit of the number."""
    for size in (64, 32, 16, 8, 4, 2, 1):

        @pl.when(rows & size != 0)
        def _(size: int = size, first: Any = first) -> None:
            plgpu.copy_smem_to_gmem(part.at[pl.ds(first, size)], y.at[pl.ds(first, size)])

        first = first + (rows & size)
