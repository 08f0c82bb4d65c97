"""NF4, FP4, and N2 in two bits: each value of a block is the nearest of 16 (or 4), times the block's magnitude.

With double quantisation the magnitudes are 8-bit themselves. Codes and values are those of bitsandbytes where 64
divides `in`: both run a block along the inputs of one output.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import KERNEL, at_least_float32, form, frozen, static
from lowrank.weights.quantized.base import Quantized
from lowrank.weights.quantized.double_quantization import QuantizedScale, double_quantize
from lowrank.weights.quantized.lookup_tables import TABLES, bits_per_code, decision_boundaries, lookup, nearest_code
from lowrank.weights.quantized.packing import pack, reciprocal_scale, split_blocks, unpack

# Of its largest magnitude: what a two-bit block's outer level may be.
OUTER_LEVELS = np.linspace(0.4, 1, 31, dtype=np.float32)


@form
class Codebook(Quantized):
    """`codes` uint8 `[..., in * bits / 8, out]`; `scale` `[..., in / block, out]`, plain or a DoubleScale.

    A calibrated one has a `shift` like the scale, what its table's zero stands for.
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
        """Of a code."""
        return bits_per_code(self.table)

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """Rows and columns that each element of a field stands for."""
        return {"codes": (8 // self.bits, 1), "scale": (self.block, 1), "shift": (self.block, 1)}

    def with_plain_scales(self) -> Self:
        """With plain magnitudes: a 64th of the kernel's elements."""
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
    """The codes of a kernel `[..., in, out]`; a block of zeros stays zeros.

    `calibrate` candidates for each block's shift are tried, and the one taken whose codes say most (have the largest
    entropy): IR-QLoRA's calibration (arXiv:2402.05445, equation 7), between 0.1 deviations about the median.
    `inside` `[..., n, block, 1]` is 0 for rows that are padding, which two-bit blocks do not fit their scale to.
    """
    values = split_blocks(w, block, 8 // bits_per_code(table))
    shift = _calibrated(values, table, calibrate) if calibrate else None
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
    """`(codes [..., n, block, out], magnitudes [..., n, out])` of blocks less their shift.

    A two-bit block's outer level is not its largest magnitude, but the share of it with the least squared error.
    """
    scaled, absmax = _scaled(values, shift, table, inside)
    return nearest_code(scaled, TABLES[table]), absmax


def _scaled(
    values: jax.Array, shift: jax.Array | None, table: str, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`(blocks in units of their magnitude, magnitudes)`, less the shift."""
    spread = lambda x: jnp.broadcast_to(x[..., None, :], values.shape)  # noqa: E731
    values = values if shift is None else values - spread(shift)
    absmax = jnp.max(jnp.abs(values), axis=-2)
    if bits_per_code(table) == 2:
        absmax = absmax * _shrunk(values, absmax, TABLES[table], inside)
    return values * spread(reciprocal_scale(absmax, 1)), absmax


def _shrunk(values: jax.Array, absmax: jax.Array, table: np.ndarray, inside: jax.Array | None) -> jax.Array:
    """The share `[..., n, out]` of each block's magnitude, of SHRUNK, that its outer level should be."""
    spread = lambda x: jnp.broadcast_to(x[..., None, :], values.shape)  # noqa: E731
    counted = 1.0 if inside is None else jnp.broadcast_to(inside, values.shape)

    def tried(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = share * absmax
        near = lookup(nearest_code(values * spread(reciprocal_scale(scale, 1)), table), table) * spread(scale)
        lost = jnp.sum((near - values) ** 2 * counted, axis=-2)
        better = lost < best[0]
        return (jnp.where(better, lost, best[0]), jnp.where(better, share, best[1])), None

    start = (jnp.full(absmax.shape, jnp.inf), jnp.ones(absmax.shape))
    return jax.lax.scan(tried, start, jnp.asarray(OUTER_LEVELS[::-1]))[0][1]


def _calibrated(values: jax.Array, table: str, candidates: int) -> jax.Array:
    """The shift `[..., n, out]` of each block, of `candidates` tried one after another."""
    middle, reach = jnp.median(values, axis=-2), 0.1 * jnp.std(values, axis=-2)

    def tried(best: tuple[jax.Array, jax.Array], at: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        shift = middle + at * reach
        found = code_entropy(_scaled(values, shift, table)[0], TABLES[table])
        better = found > best[0]
        return (jnp.where(better, found, best[0]), jnp.where(better, shift, best[1])), None

    start = (jnp.full(middle.shape, -1.0), middle)
    return jax.lax.scan(tried, start, jnp.linspace(-1, 1, candidates))[0][1]


def code_entropy(values: jax.Array, table: np.ndarray) -> Any:
    """Of the entries of a table nearest to a block's values `[..., block, out]`, in nats `[..., out]`.

    How many values lie above each edge is counted, which says how often each code occurs: none is made.
    """
    block = values.shape[-2]
    none = jnp.zeros_like(values[..., 0, :], jnp.int32)
    above = [
        none + block,
        *(jnp.sum(values > edge, axis=-2, dtype=jnp.int32) for edge in decision_boundaries(table)),
        none,
    ]
    shares = ((more - fewer) / np.float32(block) for more, fewer in itertools.pairwise(above))
    entropy: Any = -sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0) for p in shares)
    return entropy
