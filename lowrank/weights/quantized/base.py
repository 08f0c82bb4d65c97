"""The base class of quantized weights, whose codes are dequantized one tile at a time inside the product.

No dequantized copy of the kernel exists in the forward pass, in the backward pass or among the residuals: `dot` loops
over tiles of outputs, its gradient loops over tiles of inputs, and the residuals hold the codes only.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import Weight, at_least_float32
from lowrank.kernels import half_precision_matmul
from lowrank.kernels.four_bit_matmul.dispatch import FourBits, four_bit_matmul
from lowrank.weights.quantized.partitioned_matmul import (
    Product,
    axes_to_gather,
    gather_codes,
    is_partitioned,
    partition_matmul,
)

TILE_ELEMENTS = 1 << 20  # the approximate number of dequantized values that exist at a time: 4 MB in float32
# An accelerator reads the rows once a tile. As compiled for a v5e, the gradient of 8192 rows of a 4096 x 14336 kernel
# moves 15.2 GB with tiles of 2 ** 20 values and 1.0 GB with these, which stay in VMEM.
TPU_TILE_ELEMENTS = 1 << 24
GPU_TILE_ELEMENTS = 1 << 23
LANES = 128  # the columns of a TPU's vector registers: tiles of columns are multiples of them


def tile_elements(platform: str) -> int:
    """The approximate number of dequantized values that exist at a time on a device of this `platform`."""
    return {"tpu": TPU_TILE_ELEMENTS, "gpu": GPU_TILE_ELEMENTS}.get(platform, TILE_ELEMENTS)


class Quantized(Weight):
    """A frozen kernel `[..., in, out]` in codes. A form adds the static fields `rows` (in), `dtype_name`, and `decode`.

    `layout` gives, for each array `[..., a, b]`, the numbers of kernel rows and columns that one element stands for; an
    axis with None is not sliced. The arrays may hold more rows than the kernel, up to a full block: decoding drops the
    padding.
    """

    codes: jax.Array
    scale: Any
    rows: int
    dtype_name: str
    stored: ClassVar[bool] = True

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """The kernel rows and columns that one element of each field stands for."""
        raise NotImplementedError(type(self).__name__)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized kernel; float64 if the scales were converted to it, for exact references."""
        return jnp.dtype("float64" if self.scale.dtype == jnp.float64 else self.dtype_name)

    @property
    def four_bits(self) -> FourBits | None:
        """What the codes stand for, if they are in four bits with one scale per block."""
        return None

    @property
    def row_multiple(self) -> int:
        """The number of rows of which the height of a tile must be a multiple."""
        return math.lcm(*(per[0] for per in self.layout.values() if per[0]))

    @property
    def padded_rows(self) -> int:
        """The number of rows of the kernel and its padding."""
        return self.codes.shape[-2] * (self.layout["codes"][0] or 1)

    def decode(self) -> jax.Array:
        """The dequantized kernel with its padding, `[..., padded_rows, out]`, in float32 or wider."""
        raise NotImplementedError(type(self).__name__)

    def with_plain_scales(self) -> Self:
        """The same weight with scales that need no decoding of their own."""
        return self

    def with_dtype(self, dtype_name: str) -> Self:
        """The same codes, dequantized to the dtype `dtype_name`."""
        return dataclasses.replace(self, dtype_name=dtype_name)

    def materialize(self) -> jax.Array:
        """The dequantized kernel `[..., in, out]`."""
        return self.with_plain_scales().decode()[..., : self.rows, :].astype(self.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ W` in the dtype of `x`."""
        return self.dot_in(x, x.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W`, which is not rounded; W is rounded to the dtype of `x`."""
        return self.dot_in(x, at_least_float32(x).dtype)

    def dot_in(self, x: jax.Array, dtype: Any, implementation: str = "auto") -> jax.Array:
        """`x @ W` in a dtype, that of `x` or float32; the one product that a form overrides.

        The implementation is that of `lowrank.kernels.four_bit_matmul`; `xla` multiplies tile by tile.
        """
        return _product(x, self, x.dtype, dtype, implementation)

    def tile_alignment(self) -> tuple[int, int]:
        """`(run, unit)`: a tile of rows lies within one run of rows, and its height is a multiple of the unit."""
        return self.padded_rows, self.row_multiple

    def tile(self, axis: int, start: Any, size: int) -> Self:
        """The rows (`axis=0`) or columns (`axis=1`) `start ... start + size` of a kernel that is not stacked."""
        fields: dict[str, Any] = {"rows": size} if axis == 0 else {}
        total = (self.padded_rows, self.shape[-1])[axis]
        for name, per in self.layout.items():
            value, count = getattr(self, name), per[axis]
            if value is not None and count:
                fields[name] = slice_axis(value, start // count, size // count, axis, total % size == 0)
        return dataclasses.replace(self, **fields)


def slice_axis(x: jax.Array, start: Any, size: int, axis: int, aligned: bool) -> jax.Array:
    """`size` rows or columns of `x` `[a, b]` from `start` on; aligned if `size` divides their number and the start.

    Aligned rows are taken by an index, since a TPU's compiler would copy all rows to slice others out of them.
    """
    if axis == 0 and aligned:
        return jax.lax.dynamic_index_in_dim(x.reshape(-1, size, x.shape[1]), start // size, keepdims=False)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: jax.Array, w: Quantized, dtype: Any, out: Any, implementation: str) -> jax.Array:
    """`x @ W` in the dtype `out`; the gradient is rounded to `dtype`, that of `x`, before it is multiplied."""
    del dtype
    w, bodies = _tiled(_by_columns, 0, x, w, out)
    return four_bit_matmul(x, w, bodies, out, implementation)


def _backward(dtype: Any, out: Any, implementation: str, w: Quantized, g: jax.Array) -> tuple[jax.Array, Any]:
    """`g @ W.T`, for which the codes are decoded again, and zero cotangents for the frozen weight."""
    del out, implementation
    g = g.astype(dtype)
    gathered, bodies = _tiled(_by_rows, 1, g, w, dtype)
    return jax.lax.platform_dependent(g, gathered, **bodies), zero_cotangents(w)


_product.defvjp(lambda x, w, *static: (_product(x, w, *static), w), _backward)


def zero_cotangents(w: Weight) -> Any:
    """The cotangents of a frozen weight: zeros for floating-point leaves, `float0` for integers."""

    def zero(leaf: jax.Array) -> Any:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zero, w)


def _tiled(
    by_tiles: Callable[..., jax.Array], contracted: int, x: jax.Array, w: Quantized, out: Any
) -> tuple[Quantized, dict[str, Product]]:
    """`w` as it is multiplied, and for each platform its product with `x` over its axis `contracted`, in dtype `out`.

    TPU programs have no custom partitioning. There the codes are gathered first. Where a TPU mesh shards the kernel
    still, the product is a plain one, inside which the TPU's compiler dequantizes.
    """
    gathered = axes_to_gather(x, w)
    w = gather_codes(w, gathered).with_plain_scales()

    def undivided(x: jax.Array, w: Quantized) -> jax.Array:
        return half_precision_matmul.matmul_in(out, x, w.materialize(), contracted)

    tiles = lambda elements: functools.partial(by_tiles, elements, out)  # noqa: E731
    return w, {
        "tpu": undivided if is_partitioned(w.codes, gathered) else tiles(TPU_TILE_ELEMENTS),
        "cuda": partition_matmul(tiles(GPU_TILE_ELEMENTS), contracted),
        "default": partition_matmul(tiles(TILE_ELEMENTS), contracted),
    }


def _by_columns(elements: int, out: Any, x: jax.Array, w: Quantized) -> jax.Array:
    """`x @ W`, by tiles of columns of about this number of elements."""
    unit = min(LANES, w.shape[-1])
    width = _tile_units(elements // (w.padded_rows * unit), -(-w.shape[-1] // unit)) * unit
    multiply = functools.partial(half_precision_matmul.matmul_in, out, x)
    part = lambda start, size: multiply(w.tile(1, start, size).materialize())  # noqa: E731
    return _fill_by_tiles(part, (*x.shape[:-1], w.shape[-1]), out, width, w.shape[-1])


def _by_rows(elements: int, out: Any, g: jax.Array, w: Quantized) -> jax.Array:
    """`g @ W.T`, by tiles of rows of about this number of elements."""
    run, unit = w.tile_alignment()
    height = _tile_units(elements // (w.shape[-1] * unit), run // unit) * unit
    multiply = functools.partial(half_precision_matmul.matmul_in, out, g)
    part = lambda start, size: multiply(w.tile(0, start, size).materialize(), 1)  # noqa: E731
    return _fill_by_tiles(part, (*g.shape[:-1], w.padded_rows), out, height, run)[..., : w.rows]


def _tile_units(limit: int, total: int) -> int:
    """The number of units in a tile, from 1 to `limit`, where there are `total` units to cover.

    It is the largest divisor of `total` within the limit, unless that is below half of the limit. Then it is the number
    that makes the fewest tiles of about equal size; these tiles overlap, and the overlap is computed twice.
    """
    limit = max(1, min(limit, total))
    best = max(d for d in range(1, limit + 1) if total % d == 0)
    return best if 2 * best >= limit else -(-total // -(-total // limit))


def _fill_by_tiles(
    part: Callable[[Any, int], jax.Array], shape: tuple[int, ...], dtype: Any, size: int, run: int
) -> jax.Array:
    """An array of this shape whose last axis is filled by tiles `part(start, size)`.

    Each tile lies within one run of the last axis. The last tile of a run may overlap the one before.
    """
    total = shape[-1]
    if size >= total:
        return part(0, total)
    per_run = -(-run // size)

    def fill(i: jax.Array, out: jax.Array) -> jax.Array:
        start = i * size if run % size == 0 else i // per_run * run + jnp.minimum(i % per_run * size, run - size)
        return jax.lax.dynamic_update_slice_in_dim(out, part(start, size), start, len(shape) - 1)

    return jax.lax.fori_loop(0, total // run * per_run, fill, jax.lax.empty(shape, dtype))
