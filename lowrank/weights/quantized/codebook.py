"""NF4, FP4 and the two-bit N2: a value is the nearest of a table's 16 (or 4) entries, times the absmax of its block.

With double quantization the absmaxes are quantized to 8 bits. A block runs along the inputs of one output, as in
bitsandbytes, and the codes and values equal those of bitsandbytes where 64 divides `in`.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import KERNEL, at_least_float32, form, frozen, static
from lowrank.kernels.four_bit_matmul.dispatch import FourBits
from lowrank.weights.quantized.base import Quantized
from lowrank.weights.quantized.double_quantization import QuantizedScale, double_quantize
from lowrank.weights.quantized.lookup_tables import TABLES, bits_per_code, decision_boundaries, lookup, nearest_code
from lowrank.weights.quantized.packing import pack, reciprocal_scale, split_blocks, unpack

# The candidates for the outer level of a two-bit block, as shares of the block's absmax.
OUTER_LEVELS = np.linspace(0.4, 1, 31, dtype=np.float32)


@form
class Codebook(Quantized):
    """`codes` uint8 `[..., in * bits / 8, out]` and `scale` `[..., in / block, out]`, an array or a QuantizedScale.

    A calibrated kernel has a `shift` of the scale's shape too, the value for which the table's 0 stands.
    """

    codes: jax.Array = frozen(axes=KERNEL)
    scale: Any = frozen(axes=KERNEL)
    shift: Any = frozen(axes=KERNEL, default=None)
    table: str = static()
    block: int = static()
    rows: int = static()
    dtype_name: str = static()

    @property
    def title(self) -> str:
        """NF4, FP4 or N2."""
        return self.table.upper()

    @property
    def bits(self) -> int:
        """The bits per code."""
        return bits_per_code(self.table)

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """The kernel rows and columns that one element of each field stands for."""
        return {"codes": (8 // self.bits, 1), "scale": (self.block, 1), "shift": (self.block, 1)}

    @property
    def four_bits(self) -> FourBits | None:
        """The levels of NF4 and FP4 and their blocks, unless these are shifted."""
        plain = self.bits == 4 and self.shift is None
        return FourBits(tuple(map(float, TABLES[self.table])), self.block) if plain else None

    def with_plain_scales(self) -> Self:
        """The same codes with float scales and shifts, which are a 64th of the kernel's elements."""
        scales = {name: getattr(self, name) for name in ("scale", "shift")}
        decoded: dict[str, Any] = {n: x.decode() if isinstance(x, QuantizedScale) else x for n, x in scales.items()}
        return dataclasses.replace(self, **decoded)

    def decode(self) -> jax.Array:
        """`table[codes] * scale + shift`."""
        values = lookup(unpack(self.codes, self.bits, self.block), TABLES[self.table])
        spread = lambda x: jnp.broadcast_to(at_least_float32(x)[..., None, :], values.shape)  # noqa: E731
        values = values * spread(self.scale)
        values = values if self.shift is None else values + spread(self.shift)
        return values.reshape(*self.codes.shape[:-2], -1, self.codes.shape[-1])


def quantize(
    w: jax.Array, *, table: str, block: int, double: bool, calibrate: int = 0, inside: jax.Array | None = None
) -> Codebook:
    """The codes of a kernel `[..., in, out]`; a block of zeros is dequantized to zeros.

    Args:
      w: the kernel.
      table: a key of `lookup_tables.TABLES`.
      block: the number of inputs that share a scale.
      double: whether the scales are quantized to 8 bits.
      calibrate: n, for `2 n + 1` candidates for each block's shift, of which the one with the largest entropy of codes
        is taken: IR-QLoRA's calibration (arXiv:2402.05445, equation 7). They are the block's median and n values on
        each side of it, evenly spread to 0.1 deviations of the block.
      inside: `[..., n, block, 1]`, 0 for rows of padding, to which two-bit blocks do not fit their scale.
    """
    values = split_blocks(w, block, 8 // bits_per_code(table))
    shift = _calibrate_shift(values, table, calibrate) if calibrate else None
    codes, absmax = encode_blocks(values, shift, table, inside)
    scales = {"scale": absmax, "shift": shift}
    stored: dict[str, Any] = {n: double_quantize(x) if double and x is not None else x for n, x in scales.items()}
    return Codebook(
        codes=pack(codes, bits_per_code(table)),
        **stored,
        table=table,
        block=block,
        rows=w.shape[-2],
        dtype_name=jnp.dtype(w.dtype).name,
    )


def encode_blocks(
    values: jax.Array, shift: jax.Array | None, table: str, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`(codes [..., n, block, out], scales [..., n, out])` of blocks `[..., n, block, out]` less their shift.

    The scale of a two-bit block is not its absmax, but the share of it that gives the least squared error.
    """
    scaled, absmax = _scale_blocks(values, shift, table, inside)
    return nearest_code(scaled, TABLES[table]), absmax


def _scale_blocks(
    values: jax.Array, shift: jax.Array | None, table: str, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`(blocks divided by their scales, scales)`, after subtracting the shift."""
    spread = lambda x: jnp.broadcast_to(x[..., None, :], values.shape)  # noqa: E731
    values = values if shift is None else values - spread(shift)
    absmax = jnp.max(jnp.abs(values), axis=-2)
    if bits_per_code(table) == 2:
        absmax = absmax * _fit_outer_level(values, absmax, TABLES[table], inside)
    return values * spread(reciprocal_scale(absmax, 1)), absmax


def _fit_outer_level(values: jax.Array, absmax: jax.Array, table: np.ndarray, inside: jax.Array | None) -> jax.Array:
    """The share of OUTER_LEVELS, for each block `[..., n, out]`, whose squared error is the least."""
    spread = lambda x: jnp.broadcast_to(x[..., None, :], values.shape)  # noqa: E731
    counted = 1.0 if inside is None else jnp.broadcast_to(inside, values.shape)

    def compare(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = share * absmax
        rounded = lookup(nearest_code(values * spread(reciprocal_scale(scale, 1)), table), table) * spread(scale)
        error = jnp.sum((rounded - values) ** 2 * counted, axis=-2)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, share, best[1])), None

    start = (jnp.full(absmax.shape, jnp.inf), jnp.ones(absmax.shape))
    return jax.lax.scan(compare, start, jnp.asarray(OUTER_LEVELS[::-1]))[0][1]


def _calibrate_shift(values: jax.Array, table: str, per_side: int) -> jax.Array:
    """The shift `[..., n, out]` of each block with the largest entropy, of `2 per_side + 1` compared in turn."""
    middle, reach = jnp.median(values, axis=-2), 0.1 * jnp.std(values, axis=-2)

    def compare(best: tuple[jax.Array, jax.Array], offset: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        shift = middle + offset * reach
        entropy = code_entropy(_scale_blocks(values, shift, table)[0], TABLES[table])
        better = entropy > best[0]
        return (jnp.where(better, entropy, best[0]), jnp.where(better, shift, best[1])), None

    start = (jnp.full(middle.shape, -1.0), middle)
    return jax.lax.scan(compare, start, jnp.arange(-per_side, per_side + 1) / per_side)[0][1]


def code_entropy(values: jax.Array, table: np.ndarray) -> Any:
    """The entropy `[..., out]`, in nats, of the codes of a block's scaled values `[..., block, out]`.

    The codes are not formed: the values above each decision boundary are counted, and the differences of these counts
    are the frequencies of the codes.
    """
    block = values.shape[-2]
    zero = jnp.zeros_like(values[..., 0, :], jnp.int32)
    above = [
        zero + block,
        *(jnp.sum(values > edge, axis=-2, dtype=jnp.int32) for edge in decision_boundaries(table)),
        zero,
    ]
    shares = ((more - fewer) / np.float32(block) for more, fewer in itertools.pairwise(above))
    entropy: Any = -sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0) for p in shares)
    return entropy
