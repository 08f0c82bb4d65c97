"""Evenly spaced codes: int8 and int4 by the largest magnitude, int4 between minimum and maximum, ternary by the mean.

A group of `block` rows of one output shares a scale, and an asymmetric one a zero: `W = (code - zero) * scale`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.weight import KERNEL, at_least_float32, form, frozen, static
from lowrank.weights.quantized import base
from lowrank.weights.quantized.base import Quantized, slice_axis
from lowrank.weights.quantized.packing import pack, reciprocal_scale, split_blocks, unpack, whole_column_block

BITS = (2, 4, 8)


@form
class Uniform(Quantized):
    """`codes` uint8 `[..., in * bits / 8, out]`, `scale` `[..., in / block, out]`, `zero` the same, or a constant.

    Without a `zero` the middle code, `2 ** (bits - 1)`, means 0.
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
        """Rows and columns that each element of a field stands for."""
        return {"codes": (8 // self.bits, 1), "scale": (self.block, 1), "zero": (self.block, 1)}

    def tile_alignment(self) -> tuple[int, int]:
        """As for all; a block that is too large for a tile is cut into the runs that `pack` made."""
        run = self.block * self.bits // 8
        fits = self.block * self.shape[-1] <= base.TILE_ELEMENTS
        return super().tile_alignment() if fits else (run, math.gcd(run, 32))

    def tile(self, axis: int, start: Any, size: int) -> Self:
        """As for all; a part of a run is unpacked: its codes have a byte each."""
        if axis == 1 or size % self.block == 0:
            return super().tile(axis, start, size)
        run, each = self.block * self.bits // 8, 8 // self.bits
        block, place, within = start // self.block, start // run % each, start % run
        codes = slice_axis(self.codes, block * run + within, size, 0, run % size == 0)
        codes = codes >> jnp.asarray(place * self.bits, jnp.uint8) & np.uint8(2**self.bits - 1)
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
    """Codes about 0 by each group's largest magnitude: `round(w / s)`, `s = max|w| / (2 ** (bits - 1) - 1)`.

    `block` 0: one group an output (absmax per channel).
    """
    block, values = _grouped(w, bits, block)
    top = 2 ** (bits - 1) - 1
    absmax = jnp.max(jnp.abs(values), axis=-2)
    codes = jnp.round(values * jnp.broadcast_to(reciprocal_scale(absmax, top)[..., None, :], values.shape))
    return _made(w, jnp.clip(codes, -top, top) + 2 ** (bits - 1), absmax / top, None, bits, block)


def quantize_asymmetric(w: jax.Array, *, bits: int, block: int = 0) -> Uniform:
    """Codes between each group's minimum and maximum, 0 among them: `s = (max - min) / (2 ** bits - 1)`.

    `zero = round(-min / s)` stands for 0, which so is exact; it is kept in float32.
    """
    block, values = _grouped(w, bits, block)
    scale, zero = scale_and_zero(values, bits, False)
    spread = lambda a: jnp.broadcast_to(a[..., None, :], values.shape)  # noqa: E731
    codes = jnp.round(values / spread(scale)) + spread(zero)
    return _made(w, jnp.clip(codes, 0, 2**bits - 1), scale, zero, bits, block)


def scale_and_zero(values: jax.Array, bits: int, symmetric: bool) -> tuple[jax.Array, jax.Array | None]:
    """`(scale, zero)` `[..., out]` of groups `[..., block, out]`; no zero if `symmetric`."""
    if symmetric:
        return jnp.max(jnp.abs(values), axis=-2) / (2 ** (bits - 1) - 1), None
    low, high = jnp.minimum(jnp.min(values, axis=-2), 0), jnp.maximum(jnp.max(values, axis=-2), 0)
    scale = jnp.where(high > low, (high - low) / (2**bits - 1), 1)
    return scale, jnp.round(-low / scale)


def quantize_ternary(w: jax.Array) -> Uniform:
    """`{-1, 0, 1} * mean|W|`, one mean a kernel: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764, equations 1-3)."""
    block, values = _grouped(w, 2, 0)
    mean = jnp.mean(jnp.abs(w.astype(jnp.float32)), axis=(-2, -1))[..., None, None]
    mean = jnp.where(mean > 0, mean, 1)
    codes = jnp.clip(jnp.round(values / jnp.broadcast_to(mean[..., None], values.shape)), -1, 1)
    scale = jnp.broadcast_to(mean, (*w.shape[:-2], 1, w.shape[-1]))
    return _made(w, codes + 2, scale, None, 2, block)


def _grouped(w: jax.Array, bits: int, block: int) -> tuple[int, jax.Array]:
    if bits not in BITS:
        raise UserError(f"{bits} bits: only {', '.join(map(str, BITS))} are supported")
    block = block or whole_column_block(w, bits)
    return block, split_blocks(w, block, 8 // bits)


def _made(w: Any, codes: jax.Array, scale: jax.Array, zero: jax.Array | None, bits: int, block: int) -> Uniform:
    packed = pack(codes.astype(jnp.uint8), bits)
    rows, dtype_name = w.shape[-2], jnp.dtype(w.dtype).name
    return Uniform(codes=packed, scale=scale, zero=zero, bits=bits, block=block, rows=rows, dtype_name=dtype_name)
