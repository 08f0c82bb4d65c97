"""A kernel in the formats of GGUF files, with the same bytes in another order: Q4_0, Q4_1, Q8_0, Q4_K and Q6_K.

A file stores each output as blocks of 32 or 256 inputs. A block holds one or two half-precision numbers, the codes and,
if it has 256 inputs, a small scale for each part. Here each of these is an array `[..., rows, out]`. The formats are
defined in https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c and `gguf.quants`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import KERNEL, at_least_float32, form, frozen, static
from lowrank.kernels.four_bit_matmul.dispatch import SIGNED, FourBits
from lowrank.weights.quantized.base import Quantized
from lowrank.weights.quantized.packing import unpack


@form
class GGML(Quantized):
    """`W = (code - middle) * scale * sub + low * low_sub`; a field that the format does not have is None.

    `codes`, and the two bits above them in `high`, are packed in runs as by `packing.pack`. The float16 `scale` and
    `low` have one row per `block` rows of the kernel, the 8-bit integers `sub` and `low_sub` one row per `part` rows.
    """

    codes: jax.Array = frozen(axes=KERNEL)
    scale: jax.Array = frozen(axes=KERNEL)
    high: jax.Array | None = frozen(axes=KERNEL, default=None)
    sub: jax.Array | None = frozen(axes=KERNEL, default=None)
    low: jax.Array | None = frozen(axes=KERNEL, default=None)
    low_sub: jax.Array | None = frozen(axes=KERNEL, default=None)
    format: str = static()
    rows: int = static()
    dtype_name: str = static()

    @property
    def title(self) -> str:
        """The format's name."""
        return self.format

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """The kernel rows and columns that one element of each field stands for."""
        f = FORMATS[self.format]
        scale = f.part if self.sub is None else f.block
        layout = {"codes": (8 // f.bits, 1), "scale": (scale, 1), "low": (scale, 1)}
        return layout | {"high": (4, 1), "sub": (f.part, 1), "low_sub": (f.part, 1)}

    @property
    def four_bits(self) -> FourBits | None:
        """The levels and blocks of Q4_0, the format whose only fields are codes and scales."""
        return FourBits(SIGNED, 32) if self.format == "Q4_0" else None

    @property
    def row_multiple(self) -> int:
        """The number of rows of which the height of a tile must be a multiple: that of the fields and of the runs."""
        return math.lcm(super().row_multiple, FORMATS[self.format].runs)

    def with_plain_scales(self) -> Self:
        """The same codes with one float scale per part: the scale of its block times its own."""
        if self.sub is None:
            return self
        low = None if self.low is None else self._part_scales(self.low, self.low_sub)
        return dataclasses.replace(self, scale=self._part_scales(self.scale, self.sub), sub=None, low=low, low_sub=None)

    def _part_scales(self, block_scales: jax.Array, sub: jax.Array | None) -> jax.Array:
        assert sub is not None
        f = FORMATS[self.format]
        scales = at_least_float32(block_scales)
        return jnp.repeat(scales, f.block // f.part, axis=-2) * sub.astype(scales.dtype)

    def decode(self) -> jax.Array:
        """The dequantized kernel with its padding, in float32 or wider."""
        w, f = self.with_plain_scales(), FORMATS[self.format]
        scale = at_least_float32(w.scale)
        codes = unpack(w.codes, f.bits, f.runs)
        if w.high is not None:
            codes = codes | unpack(w.high, 2, f.runs) << np.uint8(4)
        *stack, parts, out = scale.shape
        values = codes.reshape(*stack, parts, f.part, out).astype(scale.dtype) - f.middle
        values = values * jnp.broadcast_to(scale[..., None, :], values.shape)
        if w.low is not None:
            values = values + jnp.broadcast_to(at_least_float32(w.low).astype(scale.dtype)[..., None, :], values.shape)
        return values.reshape(*stack, parts * f.part, out)


@dataclasses.dataclass(frozen=True)
class Format:
    """The layout of a block: `read` splits bytes `[..., out, n, block_bytes]` into fields `[..., out, n, k]`."""

    block_bytes: int
    block: int  # rows
    part: int  # rows that share a scale
    bits: int  # the bits per code in `codes`
    runs: int  # rows over which codes are packed, the first run of them in the lowest bits
    middle: float  # the code for 0
    read: Callable[[jax.Array], dict[str, jax.Array]]


def from_file_blocks(raw: jax.Array, format_name: str, dtype_name: str) -> GGML:
    """The form of a kernel whose outputs a file stores as rows of blocks, uint8 `[..., out, bytes]`."""
    f = FORMATS[format_name]
    *stack, out, size = raw.shape
    fields = f.read(raw.reshape(*stack, out, size // f.block_bytes, f.block_bytes))
    columns = {name: jnp.moveaxis(x.reshape(*stack, out, -1), -2, -1) for name, x in fields.items()}
    return GGML(**columns, format=format_name, rows=size // f.block_bytes * f.block, dtype_name=dtype_name)


def _half(pair: jax.Array) -> jax.Array:
    """float16 `[..., 1]` from its two bytes."""
    return jax.lax.bitcast_convert_type(pair, jnp.float16)[..., None]


def _q4_k(b: jax.Array) -> dict[str, jax.Array]:
    """Eight parts of 32 rows, with 6-bit scales and minima.

    The upper two bits of the last four scales (and minima) are stored above those of the first four.
    """
    first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    top = lambda x: (x >> np.uint8(6)) << np.uint8(4)  # noqa: E731
    sub = jnp.concatenate([first & np.uint8(63), third & np.uint8(15) | top(first)], axis=-1)
    low_sub = jnp.concatenate([second & np.uint8(63), third >> np.uint8(4) | top(second)], axis=-1)
    return {
        "scale": _half(b[..., :2]),
        "low": -_half(b[..., 2:4]),
        "sub": sub,
        "low_sub": low_sub,
        "codes": b[..., 16:],
    }


def _q6_k(b: jax.Array) -> dict[str, jax.Array]:
    """Sixteen parts of 16 rows, with signed 8-bit scales; the lower four bits of all codes precede the upper two."""
    sub = jax.lax.bitcast_convert_type(b[..., 192:208], jnp.int8)
    return {"codes": b[..., :128], "high": b[..., 128:192], "sub": sub, "scale": _half(b[..., 208:])}


FORMATS: dict[str, Format] = {
    "Q4_0": Format(18, 32, 32, 4, 32, 8.0, lambda b: {"scale": _half(b[..., :2]), "codes": b[..., 2:]}),
    "Q4_1": Format(
        *(20, 32, 32, 4, 32, 0.0),
        lambda b: {"scale": _half(b[..., :2]), "low": _half(b[..., 2:4]), "codes": b[..., 4:]},
    ),
    # The file's codes are signed; the flipped upper bit makes them unsigned codes with the middle 128.
    "Q8_0": Format(
        *(34, 32, 32, 8, 32, 128.0), lambda b: {"scale": _half(b[..., :2]), "codes": b[..., 2:] ^ np.uint8(128)}
    ),
    "Q4_K": Format(144, 256, 32, 4, 64, 0.0, _q4_k),
    "Q6_K": Format(210, 256, 16, 4, 128, 32.0, _q6_k),
}
