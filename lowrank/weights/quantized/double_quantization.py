"""Double quantization: scales that are quantized to 8 bits themselves (Dettmers et al. 2023, arXiv:2305.14314)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import KERNEL, form, frozen
from lowrank.weights.quantized.lookup_tables import decision_boundaries, lookup

SECOND_BLOCK = 256  # the number of scales that share a second scale


def dynamic_table() -> np.ndarray:
    """The 256 values, ascending, of Dettmers' signed 8-bit numbers with varying exponents (2015, arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        first, k = np.float64(np.float32(0.1)), np.arange(n + 1)
        step = np.float64(np.float32(np.float32(1 - first) / np.float32(n)))
        # In float32 from both ends, as torch.linspace computes, which gives bitsandbytes' table to the bit.
        ends = np.where(k < (n + 1) // 2, first + step * k, 1 - step * (n - k)).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


def _gathered(codes: jax.Array) -> jax.Array:
    return jnp.asarray(dynamic_table())[codes]


def compute_dynamic_values(codes: jax.Array) -> jax.Array:
    """`dynamic_table()[codes]` up to rounding in float32, by arithmetic: a TPU is slow at gathers of single numbers."""
    place = codes.astype(jnp.int32) - 127  # the table holds 127 negative values, 0, 127 positive values and 1
    size = jnp.abs(place)
    exponent = sum((size >= 2**k).astype(jnp.int32) for k in range(1, 7))
    runs = (jnp.int32(1) << exponent).astype(jnp.float32)
    middle = 0.1 + 0.9 * (size.astype(jnp.float32) + 0.5 - runs) / runs
    value = middle * lookup(exponent.astype(jnp.uint8), np.float32(10.0) ** np.arange(-6, 1, dtype=np.float32))
    value = jnp.where(size == 128, 1.0, jnp.where(size == 0, 0.0, value))
    return jnp.where(place < 0, -value, value)


@form
class QuantizedScale:
    """Scales `[..., n, out]` in 8 bits: `table[codes] * second + offset`, where `second` and `offset` are float32.

    Blocks of 256 run along the scales of one output and then of the next; `second` is `[..., ceil(n * out / 256)]`.
    """

    codes: jax.Array = frozen(axes=KERNEL)
    second: jax.Array = frozen()
    offset: jax.Array = frozen()

    @property
    def dtype(self) -> Any:
        """The dtype of the scales."""
        return self.second.dtype

    def decode(self) -> jax.Array:
        """The scales `[..., n, out]`."""
        *stack, n, out = self.codes.shape
        second = jnp.repeat(self.second, SECOND_BLOCK, axis=-1)[..., : n * out]
        second = second.reshape(*stack, out, n).swapaxes(-1, -2)
        values = jax.lax.platform_dependent(self.codes, tpu=compute_dynamic_values, default=_gathered) * second
        return values + jnp.broadcast_to(self.offset[..., None, None], values.shape)


def double_quantize(absmax: jax.Array) -> QuantizedScale:
    """The scales `[..., n, out]` in 8 bits, after subtracting their mean."""
    *stack, n, out = absmax.shape
    offset = jnp.mean(absmax, axis=(-2, -1))
    flat = (absmax - jnp.broadcast_to(offset[..., None, None], absmax.shape)).swapaxes(-1, -2).reshape(*stack, n * out)
    flat = jnp.pad(flat, [(0, 0)] * len(stack) + [(0, -(n * out) % SECOND_BLOCK)])
    flat = flat.reshape(*stack, -1, SECOND_BLOCK)
    second = jnp.max(jnp.abs(flat), axis=-1)
    scaled = flat / jnp.where(second > 0, second, 1)[..., None]
    codes = jnp.searchsorted(jnp.asarray(decision_boundaries(dynamic_table())), scaled).astype(jnp.uint8)
    codes = codes.reshape(*stack, -1)[..., : n * out].reshape(*stack, out, n).swapaxes(-1, -2)
    return QuantizedScale(codes=codes, second=second, offset=offset)
