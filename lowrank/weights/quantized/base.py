"""What every quantised weight shares: codes that are decoded a tile at a time, inside the product.

No dequantised copy of the kernel exists in the forward pass, in the backward pass or among what is saved between
them: `dot` walks over tiles of its outputs, its gradient over tiles of its inputs, and nothing but the codes is kept.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import Weight
from lowrank.kernels import half_precision_matmul
from lowrank.weights.quantized.partitioned_matmul import is_partitioned, partition_matmul

TILE_ELEMENTS = 1 << 20  # about how many decoded values exist at a time: 4 MB in float32
LANES = 128  # columns that a TPU has side by side: tiles are multiples of them


class Quantized(Weight):
    """A frozen kernel `[..., in, out]` in codes. A form has static fields `rows` (in) and `dtype_name`, and `decode`.

    `layout` says of each array `[..., a, b]` how many kernel rows and columns one element stands for; None is not cut.
    Arrays may hold more rows than the kernel, up to a whole block: what pads them is cut off after decoding.
    """

    codes: jax.Array
    scale: Any
    rows: int
    dtype_name: str
    stored: ClassVar[bool] = True

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """Rows and columns that each element of a field stands for."""
        raise NotImplementedError(type(self).__name__)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def dtype(self) -> Any:
        """The dtype of the decoded kernel; float64 where the scales were lifted to it, for exact references."""
        return jnp.dtype("float64" if self.scale.dtype == jnp.float64 else self.dtype_name)

    @property
    def row_multiple(self) -> int:
        """How many rows a tile must be a multiple of."""
        return math.lcm(*(per[0] for per in self.layout.values() if per[0]))

    @property
    def padded(self) -> int:
        """The rows of the kernel and what pads them."""
        return self.codes.shape[-2] * (self.layout["codes"][0] or 1)

    def decode(self) -> jax.Array:
        """The kernel with its padding, `[..., padded, out]`, at least float32."""
        raise NotImplementedError(type(self).__name__)

    def with_plain_scales(self) -> Self:
        """The same weight with scales that need no decoding of their own."""
        return self

    def with_dtype(self, dtype_name: str) -> Self:
        """The same codes, decoded to the dtype `dtype_name`."""
        return dataclasses.replace(self, dtype_name=dtype_name)

    def materialize(self) -> jax.Array:
        """The kernel that the codes stand for."""
        return self.with_plain_scales().decode()[..., : self.rows, :].astype(self.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ W`, tile by tile."""
        return _product(x, self)

    def tile_alignment(self) -> tuple[int, int]:
        """`(run, unit)`: a tile of rows lies within a run of them, and is a multiple of the unit."""
        return self.padded, self.row_multiple

    def tile(self, axis: int, start: Any, size: int) -> Self:
        """Rows (`axis=0`) or columns (`axis=1`) `start ... start + size` of a kernel without a stack."""
        cut: dict[str, Any] = {"rows": size} if axis == 0 else {}
        whole = (self.padded, self.shape[-1])[axis]
        for name, per in self.layout.items():
            value = getattr(self, name)
            step = per[axis]
            if value is not None and step:
                cut[name] = slice_axis(value, start // step, size // step, axis, whole % size == 0)
        return dataclasses.replace(self, **cut)


def slice_axis(x: jax.Array, start: Any, size: int, axis: int, aligned: bool) -> jax.Array:
    """`size` rows or columns of `x` `[a, b]`; `aligned`: `size` divides them all, and `start`."""
    if axis == 0 and aligned:  # whole runs of rows: a TPU's compiler would move all of them to cut out others
        return jax.lax.dynamic_index_in_dim(x.reshape(-1, size, x.shape[1]), start // size, keepdims=False)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


@jax.custom_vjp
def _product(x: jax.Array, w: Quantized) -> jax.Array:
    return _multiplied(_forward, 0, x, w)


def _backward(w: Quantized, g: jax.Array) -> tuple[jax.Array, Any]:
    """`g @ W.T`, and no gradient for what is frozen."""
    return _multiplied(_transposed, 1, g, w), jax.tree.map(_nothing, w)


_product.defvjp(lambda x, w: (_product(x, w), w), _backward)


def _nothing(leaf: jax.Array) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)


def _multiplied(tiled: Any, contracted: int, x: jax.Array, w: Quantized) -> jax.Array:
    """`x` times the kernel, summed over its axis `contracted`.

    A TPU's compiler knows no operation that divides itself, but decodes inside a product of its own.
    """
    w = w.with_plain_scales()

    def whole(x: jax.Array, w: Quantized) -> jax.Array:
        return half_precision_matmul.matmul(x, w.materialize(), contracted)

    return jax.lax.platform_dependent(
        x, w, tpu=whole if is_partitioned(w.codes) else tiled, default=partition_matmul(tiled, contracted)
    )


def _forward(x: jax.Array, w: Quantized) -> jax.Array:
    """`x @ W`, by tiles of columns."""
    unit = min(LANES, w.shape[-1])
    width = _near(TILE_ELEMENTS // (w.padded * unit), -(-w.shape[-1] // unit)) * unit
    part = lambda start, size: half_precision_matmul.matmul(x, w.tile(1, start, size).materialize())  # noqa: E731
    return _by_tiles(part, (*x.shape[:-1], w.shape[-1]), x.dtype, width, w.shape[-1])


def _transposed(g: jax.Array, w: Quantized) -> jax.Array:
    """`g @ W.T`, by tiles of rows."""
    run, unit = w.tile_alignment()
    height = _near(TILE_ELEMENTS // (w.shape[-1] * unit), run // unit) * unit
    part = lambda start, size: half_precision_matmul.matmul(g, w.tile(0, start, size).materialize(), 1)  # noqa: E731
    return _by_tiles(part, (*g.shape[:-1], w.padded), g.dtype, height, run)[..., : w.rows]


def _near(limit: int, whole: int) -> int:
    """At most `limit`, at least 1: a divisor of `whole` if one is no less than half of it, else what makes parts alike.

    Parts overlap where they do not divide the whole, and what is in two of them is computed twice.
    """
    limit = max(1, min(limit, whole))
    best = max(d for d in range(1, limit + 1) if whole % d == 0)
    return best if 2 * best >= limit else -(-whole // -(-whole // limit))


def _by_tiles(part: Any, shape: tuple[int, ...], dtype: Any, size: int, run: int) -> jax.Array:
    """An array whose last axis is filled `size` at a time by `part(start, size)`.

    No tile lies across two runs; the last one of a run may overlap another.
    """
    whole = shape[-1]
    if size >= whole:
        return part(0, whole)
    each = -(-run // size)

    def fill(i: jax.Array, out: jax.Array) -> jax.Array:
        start = i * size if run % size == 0 else i // each * run + jnp.minimum(i % each * size, run - size)
        return jax.lax.dynamic_update_slice_in_dim(out, part(start, size), start, len(shape) - 1)

    return jax.lax.fori_loop(0, whole // run * each, fill, jnp.zeros(shape, dtype))
