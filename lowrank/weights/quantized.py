"""What every quantised weight shares: codes that are decoded a tile at a time, inside the product.

No dequantised copy of the kernel exists in the forward pass, in the backward pass or among what is saved between
them: `dot` walks over tiles of its outputs, its gradient over tiles of its inputs, and nothing but the codes is kept.
The TPU's compiler decodes inside its matrix product by itself, so there the product is written as one.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.errors import UserError
from lowrank.weight import Weight

TILE = 1 << 20  # how many decoded values exist at a time: 4 MB in float32


class Quantized(Weight):
    """A frozen kernel `[..., in, out]` in codes. A form has static fields `rows` (in) and `kind` (dtype), and `decode`.

    `layout` says of each array `[..., a, b]` how many kernel rows and columns one element stands for; None is not cut.
    Arrays may hold more rows than the kernel, up to a whole block: what pads them is cut off after decoding.
    """

    layout: Mapping[str, tuple[int | None, int | None]]
    stored: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def dtype(self) -> Any:
        """The dtype of the decoded kernel; float64 where the scales were lifted to it, for exact references."""
        return jnp.dtype("float64" if self.scale.dtype == jnp.float64 else self.kind)

    @property
    def grain(self) -> int:
        """How many rows a tile must be a multiple of."""
        return math.lcm(*(per[0] for per in self.layout.values() if per[0]))

    @property
    def padded(self) -> int:
        """The rows of the kernel and what pads them."""
        return self.codes.shape[-2] * self.layout["codes"][0]

    def decode(self) -> jax.Array:
        """The kernel with its padding, `[..., padded, out]`, at least float32."""
        raise NotImplementedError(type(self).__name__)

    def opened(self) -> Self:
        """The same weight with scales that need no decoding of their own."""
        return self

    def of_kind(self, kind: str) -> Self:
        """The same codes, decoded to the dtype `kind`."""
        return dataclasses.replace(self, kind=kind)

    def materialize(self) -> jax.Array:
        """The kernel that the codes stand for."""
        return self.opened().decode()[..., : self.rows, :].astype(self.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ W`, tile by tile."""
        return _product(x, self)

    def tile(self, axis: int, start: Any, size: int) -> Self:
        """Rows (`axis=0`) or columns (`axis=1`) `start ... start + size` of a kernel without a stack."""
        cut = {"rows": size} if axis == 0 else {}
        for name, per in self.layout.items():
            value = getattr(self, name)
            if value is not None and per[axis]:
                each = per[axis]
                cut[name] = jax.lax.dynamic_slice_in_dim(value, start // each, size // each, axis)
        return dataclasses.replace(self, **cut)


@jax.custom_vjp
def _product(x: jax.Array, w: Quantized) -> jax.Array:
    w = w.opened()

    def tiled(x: jax.Array, w: Quantized) -> jax.Array:
        part = lambda start, size: jnp.dot(x, w.tile(1, start, size).materialize().astype(x.dtype))  # noqa: E731
        return _by_tiles(part, (*x.shape[:-1], w.shape[-1]), x.dtype, _width(w))

    whole = lambda x, w: jnp.dot(x, w.materialize().astype(x.dtype))  # noqa: E731
    return jax.lax.platform_dependent(x, w, tpu=whole, default=tiled)


def _backward(w: Quantized, g: jax.Array) -> tuple[jax.Array, Any]:
    """`g @ W.T`, and no gradient for what is frozen."""

    def tiled(g: jax.Array, w: Quantized) -> jax.Array:
        def part(start: Any, size: int) -> jax.Array:
            return _transposed_dot(g, w.tile(0, start, size).materialize().astype(g.dtype))

        return _by_tiles(part, (*g.shape[:-1], w.padded), g.dtype, _height(w))[..., : w.rows]

    whole = lambda g, w: _transposed_dot(g, w.materialize().astype(g.dtype))  # noqa: E731
    return jax.lax.platform_dependent(g, w.opened(), tpu=whole, default=tiled), jax.tree.map(_nothing, w)


_product.defvjp(lambda x, w: (_product(x, w), w), _backward)


def _nothing(leaf: jax.Array) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)


def _transposed_dot(g: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())))


def _width(w: Quantized) -> int:
    """Columns a tile."""
    return min(w.shape[-1], max(1, TILE // w.padded))


def _height(w: Quantized) -> int:
    """Rows a tile: whole blocks."""
    return min(w.padded, max(1, TILE // (w.shape[-1] * w.grain)) * w.grain)


def _by_tiles(part: Any, shape: tuple[int, ...], dtype: Any, size: int) -> jax.Array:
    """An array whose last axis is filled `size` at a time by `part(start, size)`; the last tile may overlap another."""
    whole = shape[-1]
    if size >= whole:
        return part(0, whole)

    def fill(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, whole - size)
        return jax.lax.dynamic_update_slice_in_dim(out, part(start, size), start, len(shape) - 1)

    return jax.lax.fori_loop(0, -(-whole // size), fill, jnp.zeros(shape, dtype))


def blocks(w: jax.Array, block: int, each: int) -> jax.Array:
    """`[..., in, out]` as float32 blocks `[..., n, block, out]`, padded with zeros, of codes that go `each` to a byte.

    Raises UserError for a block that does not fill its bytes.
    """
    if block < 1 or block % each:
        raise UserError(f"a block of {block} rows: it must be a positive multiple of {each}")
    missing = -w.shape[-2] % block
    padded = jnp.pad(w.astype(jnp.float32), [(0, 0)] * (w.ndim - 2) + [(0, missing), (0, 0)])
    return padded.reshape(*w.shape[:-2], -1, block, w.shape[-1])


def per_unit(absmax: jax.Array, top: int) -> jax.Array:
    """`top / absmax`, what values are multiplied by for codes up to `top`; 0 where all values are."""
    return jnp.where(absmax > 0, top / jnp.where(absmax > 0, absmax, 1), 0)


def whole_block(w: jax.Array, bits: int) -> int:
    """The block that holds a kernel's whole column, for codes of `bits`."""
    return -(-w.shape[-2] // (8 // bits)) * (8 // bits)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes uint8 `[..., n, block, out]` below `2 ** bits`, `8 / bits` to a byte: `[..., n * block * bits / 8, out]`.

    A block is cut into `8 / bits` runs of rows, and the first run has the lowest bits of every byte: so runs of rows
    stay together, and unpacking never interleaves single rows.
    """
    *stack, n, block, out = codes.shape
    each = 8 // bits
    runs = codes.reshape(*stack, n, each, block // each, out)
    shifted = (runs[..., i, :, :] << np.uint8(i * bits) for i in range(each))
    return functools.reduce(jnp.bitwise_or, shifted).reshape(*stack, n * block // each, out)


def unpack(packed: jax.Array, bits: int, block: int) -> jax.Array:
    """The inverse of `pack`: uint8 `[..., n, block, out]`."""
    *stack, rows, out = packed.shape
    each = 8 // bits
    runs = packed.reshape(*stack, rows * each // block, 1, block // each, out)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8).reshape(each, 1, 1)
    shifts = jnp.broadcast_to(shifts, (*runs.shape[:-3], each, block // each, out))
    runs = jnp.broadcast_to(runs, shifts.shape)
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(*stack, -1, block, out)
