"""Helpers of quantized forms: kernels split into blocks, and codes of a few bits packed into bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError, plural


def split_blocks(w: jax.Array, block: int, per_byte: int) -> jax.Array:
    """The kernel `[..., in, out]` as float32 blocks `[..., n, block, out]`, padded with zeros.

    Raises UserError unless `block` is a positive multiple of `per_byte`, the number of codes in a byte.
    """
    if block < 1 or block % per_byte:
        raise UserError(f"a block cannot have {plural(block, 'row')}: it must have a positive multiple of {per_byte}")
    missing = -w.shape[-2] % block
    padded = jnp.pad(w.astype(jnp.float32), [(0, 0)] * (w.ndim - 2) + [(0, missing), (0, 0)])
    return padded.reshape(*w.shape[:-2], -1, block, w.shape[-1])


def reciprocal_scale(absmax: jax.Array, top: int) -> jax.Array:
    """The factor `top / absmax` that scales values to codes up to `top`; 0 where absmax is 0."""
    return jnp.where(absmax > 0, top / jnp.where(absmax > 0, absmax, 1), 0)


def whole_column_block(w: jax.Array, bits: int) -> int:
    """The size of a block that holds a whole column of the kernel, for codes of `bits` bits."""
    return -(-w.shape[-2] // (8 // bits)) * (8 // bits)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes uint8 `[..., n, block, out]` below `2 ** bits`, `8 / bits` per byte: `[..., n * block * bits / 8, out]`.

    A block is split into `8 / bits` runs of rows, and the first run is in the lowest bits of every byte. So the rows of
    a run stay together, and unpacking does not interleave single rows.
    """
    *stack, n, block, out = codes.shape
    per_byte = 8 // bits
    runs = codes.reshape(*stack, n, per_byte, block // per_byte, out)
    shifted = (runs[..., i, :, :] << np.uint8(i * bits) for i in range(per_byte))
    return functools.reduce(jnp.bitwise_or, shifted).reshape(*stack, n * block // per_byte, out)


def unpack(packed: jax.Array, bits: int, block: int) -> jax.Array:
    """The inverse of `pack`: uint8 `[..., n, block, out]`."""
    *stack, rows, out = packed.shape
    per_byte = 8 // bits
    runs = packed.reshape(*stack, rows * per_byte // block, 1, block // per_byte, out)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8).reshape(per_byte, 1, 1)
    shifts = jnp.broadcast_to(shifts, (*runs.shape[:-3], per_byte, block // per_byte, out))
    runs = jnp.broadcast_to(runs, shifts.shape)
    return ((runs >> shifts) & np.uint8(2**bits - 1)).reshape(*stack, -1, block, out)
