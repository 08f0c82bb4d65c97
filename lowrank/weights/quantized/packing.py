"""What forms in codes share: kernels cut into blocks, and codes of a few bits packed into bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError


def split_blocks(w: jax.Array, block: int, each: int) -> jax.Array:
    """`[..., in, out]` as float32 blocks `[..., n, block, out]`, padded with zeros, of codes that go `each` to a byte.

    Raises UserError for a block that does not fill its bytes.
    """
    if block < 1 or block % each:
        raise UserError(f"a block of {block} rows: it must be a positive multiple of {each}")
    missing = -w.shape[-2] % block
    padded = jnp.pad(w.astype(jnp.float32), [(0, 0)] * (w.ndim - 2) + [(0, missing), (0, 0)])
    return padded.reshape(*w.shape[:-2], -1, block, w.shape[-1])


def reciprocal_scale(absmax: jax.Array, top: int) -> jax.Array:
    """`top / absmax`, what values are multiplied by for codes up to `top`; 0 where all values are."""
    return jnp.where(absmax > 0, top / jnp.where(absmax > 0, absmax, 1), 0)


def whole_column_block(w: jax.Array, bits: int) -> int:
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
