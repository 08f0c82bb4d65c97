"""The grouped low-rank product on a TPU: one step for each adapter and each tile of sorted rows that it has rows in.

A step keeps the tile's rows, the adapter and the tile's result in VMEM: adapters are read once, rows are read and
written once, and what is computed is that of each row's own adapter. The speed is not measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank.kernels.grouped_lora.plain import sort_keys
from lowrank.kernels.grouped_lora.steps import plan_steps

TILE = 128  # rows
SUBLANES = 16  # ranks are padded to a multiple: the rows of a register of bfloat16
VMEM = 100 * 2**20  # bytes; a v5e and a v6e have 128 MiB


def multiply(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array, interpret: bool = False
) -> jax.Array:
    """`scale[id] * (x @ a[id].T) @ b[id]` of each row."""
    rows, adapters = len(x), len(a)
    order = jnp.argsort(sort_keys(ids, adapters), stable=True)
    keys = jnp.pad(sort_keys(ids, adapters)[order], (0, -rows % TILE), constant_values=adapters).astype(jnp.int32)
    sorted_x = jnp.pad(x[order], ((0, -rows % TILE), (0, 0)))
    a, b = (jnp.pad(w.astype(x.dtype), ((0, 0), (0, -w.shape[1] % SUBLANES), (0, 0))) for w in (a, b))
    y = _multiply_sorted(sorted_x, a, b, scale.astype(jnp.float32), keys, interpret)
    return y[:rows][jnp.argsort(order)]


def _multiply_sorted(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, keys: jax.Array, interpret: Any
) -> Any:
    (adapters, ranks, width), out = a.shape, b.shape[2]
    group, tile = plan_steps(keys, adapters, TILE)
    own = lambda step, group, tile, scale: (jnp.minimum(group[step], adapters - 1), 0, 0)  # noqa: E731
    rows = lambda step, group, tile, scale: (tile[step], 0)  # noqa: E731
    moved = x.nbytes + a.nbytes + b.nbytes + len(x) * out * x.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_step, adapters),
        out_shape=jax.ShapeDtypeStruct((len(x), out), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(group),),
            in_specs=[
                pl.BlockSpec((TILE, 1), rows),
                pl.BlockSpec((TILE, width), rows),
                pl.BlockSpec((1, ranks, width), own),
                pl.BlockSpec((1, ranks, out), own),
            ],
            out_specs=pl.BlockSpec((TILE, out), rows),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        cost_estimate=pl.CostEstimate(
            flops=2 * TILE * len(group) * ranks * (width + out), bytes_accessed=moved, transcendentals=0
        ),
        interpret=interpret,
    )(group, tile, scale, keys[:, None], x, a, b)


def _step(adapters: int, group: Any, tile: Any, scale: Any, keys: Any, x: Any, a: Any, b: Any, out: Any) -> None:
    """One adapter on one tile; the rows of other adapters keep what other steps write there."""
    step = pl.program_id(0)
    g = group[step]

    @pl.when((step == 0) | (tile[step] != tile[jnp.maximum(step - 1, 0)]))
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    @pl.when(g < adapters)
    def _() -> None:
        s = jax.lax.dot_general(x[...], a[0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        s = (s * scale[jnp.minimum(g, adapters - 1)]).astype(x.dtype)
        y = jnp.dot(s, b[0], preferred_element_type=jnp.float32).astype(out.dtype)
        out[...] = jnp.where(keys[...] == g, y, out[...])
