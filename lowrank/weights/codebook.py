"""NF4, FP4, and N2 in two bits: each value of a block is the nearest of 16 (or 4), times the block's magnitude.

NF4's sixteen are quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E), FP4's are a
sign, two bits of exponent and one of mantissa. With double quantisation the magnitudes are 8-bit themselves. Codes and
values are those of bitsandbytes where 64 divides `in`: both run a block along the inputs of one output.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.weight import form, frozen, static, wide
from lowrank.weights.quantized import Quantized, blocks, pack, per_unit, unpack

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array([*_FP4, *(-x for x in _FP4)], np.float32)}
# Two bits: the four levels nearest to a normal distribution (Max 1960, table I), the outer ones at 1.
TABLES["n2"] = np.array([-1, -0.4528 / 1.510, 0.4528 / 1.510, 1], np.float32)
# Of its largest magnitude: what a two-bit block's outer level may be.
SHRUNK = np.linspace(0.4, 1, 31, dtype=np.float32)
SECOND_BLOCK = 256


def dynamic_table() -> np.ndarray:
    """The 256 values of a signed 8-bit number whose exponent's length varies (Dettmers 2015, arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        first, k = np.float64(np.float32(0.1)), np.arange(n + 1)
        step = np.float64(np.float32(np.float32(1 - first) / np.float32(n)))
        # in float32 from both ends, which is torch's way: bitsandbytes' table to the bit
        edges = np.where(k < (n + 1) // 2, first + step * k, 1 - step * (n - k)).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


def _gathered(codes: jax.Array) -> jax.Array:
    return jnp.asarray(dynamic_table())[codes]


def computed(codes: jax.Array) -> jax.Array:
    """`dynamic_table()[codes]` to float32's last places, computed: a TPU is slow at looking up single numbers."""
    place = codes.astype(jnp.int32) - 127  # 127 negative ones, 0, 127 positive ones, 1
    size = jnp.abs(place)
    exponent = sum((size >= 2**k).astype(jnp.int32) for k in range(1, 7))
    runs = (jnp.int32(1) << exponent).astype(jnp.float32)
    middle = 0.1 + 0.9 * (size.astype(jnp.float32) + 0.5 - runs) / runs
    value = middle * looked_up(exponent.astype(jnp.uint8), np.float32(10.0) ** np.arange(-6, 1, dtype=np.float32))
    value = jnp.where(size == 128, 1.0, jnp.where(size == 0, 0.0, value))
    return jnp.where(place < 0, -value, value)


@form
class DoubleScale:
    """Magnitudes `[..., n, out]` in 8 bits: `table[codes] * second + offset`, both float32.

    Blocks of 256 run along the magnitudes of one output, then of the next: `second` is `[..., ceil(n * out / 256)]`.
    """

    codes: jax.Array = frozen()
    second: jax.Array = frozen()
    offset: jax.Array = frozen()

    @property
    def dtype(self) -> Any:
        """Of the magnitudes."""
        return self.second.dtype

    def decode(self) -> jax.Array:
        """The magnitudes `[..., n, out]`."""
        *stack, n, out = self.codes.shape
        second = jnp.repeat(self.second, SECOND_BLOCK, axis=-1)[..., : n * out]
        second = second.reshape(*stack, out, n).swapaxes(-1, -2)
        values = jax.lax.platform_dependent(self.codes, tpu=computed, default=_gathered) * second
        return values + jnp.broadcast_to(self.offset[..., None, None], values.shape)


@form
class Codebook(Quantized):
    """`codes` uint8 `[..., in * bits / 8, out]`; `scale` `[..., in / block, out]`, plain or a DoubleScale.

    A calibrated one has a `shift` like the scale, what its table's zero stands for.
    """

    codes: jax.Array = frozen()
    scale: Any = frozen()
    shift: Any = frozen(default=None)
    table: str = static()
    block: int = static()
    rows: int = static()
    kind: str = static()

    @property
    def title(self) -> str:
        """NF4, FP4 or N2."""
        return self.table.upper()

    @property
    def bits(self) -> int:
        """Of a code."""
        return bits_of(self.table)

    @property
    def layout(self) -> Mapping[str, tuple[int | None, int | None]]:
        """Rows and columns that each element of a field stands for."""
        return {"codes": (8 // self.bits, 1), "scale": (self.block, 1), "shift": (self.block, 1)}

    def opened(self) -> Self:
        """With plain magnitudes: a 64th of the kernel's elements."""
        found = {name: getattr(self, name) for name in ("scale", "shift")}
        decoded = {n: x.decode() if isinstance(x, DoubleScale) else x for n, x in found.items()}
        return dataclasses.replace(self, **decoded)

    def decode(self) -> jax.Array:
        """`table[codes] * scale + shift`."""
        spread = lambda x: jnp.broadcast_to(wide(x)[..., None, :], values.shape)  # noqa: E731
        values = looked_up(unpack(self.codes, self.bits, self.block), TABLES[self.table])
        values = values * spread(self.scale)
        values = values if self.shift is None else values + spread(self.shift)
        return values.reshape(*self.codes.shape[:-2], -1, self.codes.shape[-1])


def bits_of(table: str) -> int:
    """Of a table's codes."""
    return len(TABLES[table]).bit_length() - 1


def quantize(
    w: jax.Array, *, table: str, block: int, double: bool, calibrate: int = 0, inside: jax.Array | None = None
) -> Codebook:
    """The codes of a kernel `[..., in, out]`; a block of zeros stays zeros.

    `calibrate` candidates for each block's shift are tried, and the one taken whose codes say most (have the largest
    entropy): IR-QLoRA's calibration (arXiv:2402.05445, equation 7), between 0.1 deviations about the median.
    `inside` `[..., n, block, 1]` is 0 for rows that are padding, which two-bit blocks do not fit their scale to.
    """
    values = blocks(w, block, 8 // bits_of(table))
    shift = _calibrated(values, table, calibrate) if calibrate else None
    codes, absmax = coded(values, shift, table, inside)
    kept = {"scale": absmax, "shift": shift}
    kept = {name: _doubled(x) if double and x is not None else x for name, x in kept.items()}
    return Codebook(
        codes=pack(codes, bits_of(table)),
        **kept,
        table=table,
        block=block,
        rows=w.shape[-2],
        kind=jnp.dtype(w.dtype).name,
    )


def coded(
    values: jax.Array, shift: jax.Array | None, table: str, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`(codes [..., n, block, out], magnitudes [..., n, out])` of blocks less their shift.

    A two-bit block's outer level is not its largest magnitude, but the share of it with the least squared error.
    """
    scaled, absmax = _scaled(values, shift, table, inside)
    return nearest(scaled, TABLES[table]), absmax


def _scaled(
    values: jax.Array, shift: jax.Array | None, table: str, inside: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`(blocks in units of their magnitude, magnitudes)`, less the shift."""
    spread = lambda x: jnp.broadcast_to(x[..., None, :], values.shape)  # noqa: E731
    values = values if shift is None else values - spread(shift)
    absmax = jnp.max(jnp.abs(values), axis=-2)
    if bits_of(table) == 2:
        absmax = absmax * _shrunk(values, absmax, TABLES[table], inside)
    return values * spread(per_unit(absmax, 1)), absmax


def _shrunk(values: jax.Array, absmax: jax.Array, table: np.ndarray, inside: jax.Array | None) -> jax.Array:
    """The share `[..., n, out]` of each block's magnitude, of SHRUNK, that its outer level should be."""
    spread = lambda x: jnp.broadcast_to(x[..., None, :], values.shape)  # noqa: E731
    counted = 1.0 if inside is None else jnp.broadcast_to(inside, values.shape)

    def tried(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = share * absmax
        near = looked_up(nearest(values * spread(per_unit(scale, 1)), table), table) * spread(scale)
        lost = jnp.sum((near - values) ** 2 * counted, axis=-2)
        better = lost < best[0]
        return (jnp.where(better, lost, best[0]), jnp.where(better, share, best[1])), None

    start = (jnp.full(absmax.shape, jnp.inf), jnp.ones(absmax.shape))
    return jax.lax.scan(tried, start, jnp.asarray(SHRUNK[::-1]))[0][1]


def _calibrated(values: jax.Array, table: str, candidates: int) -> jax.Array:
    """The shift `[..., n, out]` of each block, of `candidates` tried one after another."""
    middle, reach = jnp.median(values, axis=-2), 0.1 * jnp.std(values, axis=-2)

    def tried(best: tuple[jax.Array, jax.Array], at: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        shift = middle + at * reach
        found = entropy(_scaled(values, shift, table)[0], TABLES[table])
        better = found > best[0]
        return (jnp.where(better, found, best[0]), jnp.where(better, shift, best[1])), None

    start = (jnp.full(middle.shape, -1.0), middle)
    return jax.lax.scan(tried, start, jnp.linspace(-1, 1, candidates))[0][1]


def entropy(values: jax.Array, table: np.ndarray) -> jax.Array:
    """Of the entries of a table nearest to a block's values `[..., block, out]`, in nats `[..., out]`.

    How many values lie above each edge is counted, which says how often each code occurs: none is made.
    """
    block = values.shape[-2]
    none = jnp.zeros_like(values[..., 0, :], jnp.int32)
    above = [none + block, *(jnp.sum(values > edge, axis=-2, dtype=jnp.int32) for edge in _edges(table)), none]
    shares = ((more - fewer) / np.float32(block) for more, fewer in itertools.pairwise(above))
    return -sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0) for p in shares)


def _edges(table: np.ndarray) -> np.ndarray:
    """Half way between each two entries of a table, ascending."""
    ordered = np.sort(table)
    return ((ordered[:-1] + ordered[1:]) / 2).astype(np.float32)


def _doubled(absmax: jax.Array) -> DoubleScale:
    *stack, n, out = absmax.shape
    offset = jnp.mean(absmax, axis=(-2, -1))
    flat = (absmax - jnp.broadcast_to(offset[..., None, None], absmax.shape)).swapaxes(-1, -2).reshape(*stack, n * out)
    flat = jnp.pad(flat, [(0, 0)] * len(stack) + [(0, -(n * out) % SECOND_BLOCK)])
    flat = flat.reshape(*stack, -1, SECOND_BLOCK)
    second = jnp.max(jnp.abs(flat), axis=-1)
    scaled = flat / jnp.where(second > 0, second, 1)[..., None]
    table = dynamic_table()
    codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), scaled).astype(jnp.uint8)
    codes = codes.reshape(*stack, -1)[..., : n * out].reshape(*stack, out, n).swapaxes(-1, -2)
    return DoubleScale(codes=codes, second=second, offset=offset)


def nearest(values: jax.Array, table: np.ndarray) -> jax.Array:
    """The index uint8 of the entry of a small table that is nearest to each value; the lower one of two."""
    order = np.argsort(table, kind="stable")
    rank = sum((values > edge).astype(jnp.uint8) for edge in _edges(table))
    return looked_up(rank, order.astype(np.uint8)) if np.any(order != np.arange(len(order))) else rank


def looked_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """`table[codes]` by a tree of selections on the codes' bits, which every compiler fuses; a gather it may not."""
    level: list[Any] = list(table)
    bit = 0
    while len(level) > 1:
        level += level[-1:] * (len(level) % 2)
        odd = (codes >> np.uint8(bit)) & np.uint8(1) != 0
        level = [jnp.where(odd, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit += 1
    return level[0]
