"""Evenly spaced codes of 2, 4 or 8 bits: `W = (code - zero) * scale`.

A group of `block` rows of one output shares a scale, and with asymmetric codes a zero. Symmetric codes are scaled by
the largest magnitude, asymmetric codes by the range from the minimum to the maximum, ternary codes by the mean
magnitude.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError, plural
from lowrank.core.weight import KERNEL, at_least_float32, form, frozen, static
from lowrank.kernels.four_bit_matmul.dispatch import SIGNED, FourBits
from lowrank.weights.quantized import base
from lowrank.weights.quantized.base import Quantized, slice_axis
from lowrank.weights.quantized.packing import pack, reciprocal_scale, split_blocks, unpack, whole_column_block

BITS = (2, 4, 8)


@form
class Uniform(Quantized):
    """`codes` uint8 `[..., in * bits / 8, out]`, and `scale` and `zero` `[..., in / block, out]`.

    If `zero` is None, the middle code `2 ** (bits - 1)` stands for 0.
    """

    codes: jax.Array = frozen(axes=KERNEL)
    scale: jax.Array = frozen(axes=KERNEL)
    zero: jax.Array | None = frozen(axes=KERNEL, default=None)
    bits: int = static()
    block: int = static()
    rows: int = static()
    dtype_name: str = static()

    @property
    def title(self) -> str:
        """int2, int4 or int8."""
        return f"int{self.bits}"

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """The kernel rows and columns that one element of each field stands for."""
        return {"codes": (8 // self.bits, 1), "scale": (self.block, 1), "zero": (self.block, 1)}

    @property
    def four_bits(self) -> FourBits | None:
        """The levels of symmetric codes in four bits, and their blocks."""
        return FourBits(SIGNED, self.block) if self.bits == 4 and self.zero is None else None

    def tile_alignment(self) -> tuple[int, int]:
        """`(run, unit)`: a tile of rows lies within one run of rows, and its height is a multiple of the unit.

        If a block is too large for a tile, the runs are those of `packing.pack`.
        """
        run = self.block * self.bits // 8
        fits = self.block * self.shape[-1] <= base.TILE_ELEMENTS
        return super().tile_alignment() if fits else (run, math.gcd(run, 32))

    def tile(self, axis: int, start: Any, size: int) -> Self:
        """The rows (`axis=0`) or columns (`axis=1`) `start ... start + size` of a kernel that is not stacked.

        A part of a block lies within one run of `packing.pack`. Its codes are unpacked, so that each has its own byte.
        """
        if axis == 1 or size % self.block == 0:
            return super().tile(axis, start, size)
        run, per_byte = self.block * self.bits // 8, 8 // self.bits
        block, run_index, row = start // self.block, start // run % per_byte, start % run
        codes = slice_axis(self.codes, block * run + row, size, 0, run % size == 0)
        codes = codes >> jnp.asarray(run_index * self.bits, jnp.uint8) & np.uint8(2**self.bits - 1)
        zero = jnp.full_like(self.scale, 2.0 ** (self.bits - 1)) if self.zero is None else self.zero
        scale, zero = (jax.lax.dynamic_slice_in_dim(x, block, 1) for x in (self.scale, zero))
        return dataclasses.replace(self, codes=codes, scale=scale, zero=zero, bits=8, block=size, rows=size)

    def decode(self) -> jax.Array:
        """`(code - zero) * scale`."""
        scale = at_least_float32(self.scale)[..., None, :]
        codes = unpack(self.codes, self.bits, self.block).astype(scale.dtype)
        zero = 2.0 ** (self.bits - 1) if self.zero is None else self.zero.astype(scale.dtype)[..., None, :]
        values = (codes - jnp.broadcast_to(zero, codes.shape)) * jnp.broadcast_to(scale, codes.shape)
        return values.reshape(*self.codes.shape[:-2], -1, self.codes.shape[-1])


def quantize_symmetric(w: jax.Array, *, bits: int, block: int = 0) -> Uniform:
    """Codes `round(w / s)` about 0 with `s = max|w| / (2 ** (bits - 1) - 1)`, the largest magnitude of each group.

    A `block` of 0 stands for one group per output. Raises UserError for other bits than 2, 4 and 8.
    """
    block, values = _split_groups(w, bits, block)
    top = 2 ** (bits - 1) - 1
    absmax = jnp.max(jnp.abs(values), axis=-2)
    codes = jnp.round(values * jnp.broadcast_to(reciprocal_scale(absmax, top)[..., None, :], values.shape))
    return _pack_uniform(w, jnp.clip(codes, -top, top) + 2 ** (bits - 1), absmax / top, None, bits, block)


def quantize_asymmetric(w: jax.Array, *, bits: int, block: int = 0) -> Uniform:
    """Codes between each group's minimum and maximum, or 0 if that is beyond: `s = (max - min) / (2 ** bits - 1)`.

    The code `zero = round(-min / s)`, kept in float32, stands for 0, so 0 is exact. A `block` of 0 stands for one group
    per output. Raises UserError for other bits than 2, 4 and 8.
    """
    block, values = _split_groups(w, bits, block)
    scale, zero = scale_and_zero(values, bits, False)
    spread = lambda a: jnp.broadcast_to(a[..., None, :], values.shape)  # noqa: E731
    codes = jnp.round(values / spread(scale)) + spread(zero)
    return _pack_uniform(w, jnp.clip(codes, 0, 2**bits - 1), scale, zero, bits, block)


def scale_and_zero(values: jax.Array, bits: int, symmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """`(scale, zero)`, both `[..., out]`, of groups `[..., block, out]`; the zero is None if `symmetric`."""
    if symmetric:
        return jnp.max(jnp.abs(values), axis=-2) / (2 ** (bits - 1) - 1), None
    low, high = jnp.minimum(jnp.min(values, axis=-2), 0), jnp.maximum(jnp.max(values, axis=-2), 0)
    scale = jnp.where(high > low, (high - low) / (2**bits - 1), 1)
    return scale, jnp.round(-low / scale)


def quantize_ternary(w: jax.Array) -> Uniform:
    """`{-1, 0, 1} * mean|W|` with one mean per kernel: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, eq. 1-3)."""
    block, values = _split_groups(w, 2, 0)
    mean = jnp.mean(jnp.abs(w.astype(jnp.float32)), axis=(-2, -1))[..., None, None]
    mean = jnp.where(mean > 0, mean, 1)
    codes = jnp.clip(jnp.round(values / jnp.broadcast_to(mean[..., None], values.shape)), -1, 1)
    scale = jnp.broadcast_to(mean, (*w.shape[:-2], 1, w.shape[-1]))
    return _pack_uniform(w, codes + 2, scale, None, 2, block)


def _split_groups(w: jax.Array, bits: int, block: int) -> tuple[int, jax.Array]:
    """`(block, groups [..., n, block, out])`; the block 0 is replaced by one that holds a whole column."""
    if bits not in BITS:
        raise UserError(f"uniform codes cannot have {plural(bits, 'bit')}: use {', '.join(map(str, BITS))}")
    block = block or whole_column_block(w, bits)
    return block, split_blocks(w, block, 8 // bits)


def _pack_uniform(w: Any, codes: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int, block: int) -> Uniform:
    packed = pack(codes.astype(jnp.uint8), bits)
    rows, dtype_name = w.shape[-2], jnp.dtype(w.dtype).name
    return Uniform(codes=packed, scale=scale, zero=zero, bits=bits, block=block, rows=rows, dtype_name=dtype_name)
