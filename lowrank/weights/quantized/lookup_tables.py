"""Tables of the numbers that codes stand for, the code of a value, and the number of a code.

NF4's sixteen numbers are quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E). FP4
has a sign bit, two bits of exponent and one bit of mantissa.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
TABLES = {"nf4": np.array(NF4, np.float32), "fp4": np.array([*_FP4, *(-x for x in _FP4)], np.float32)}
# N2 has the four levels of the least squared error for a normal distribution (Max 1960, table I), scaled to end at 1.
TABLES["n2"] = np.array([-1, -0.4528 / 1.510, 0.4528 / 1.510, 1], np.float32)


def bits_per_code(table: str) -> int:
    """The bits per code of a table."""
    return len(TABLES[table]).bit_length() - 1


def decision_boundaries(table: np.ndarray) -> np.ndarray:
    """The midpoints between neighboring entries of a table, ascending."""
    ordered = np.sort(table)
    return ((ordered[:-1] + ordered[1:]) / 2).astype(np.float32)


def nearest_code(values: jax.Array, table: np.ndarray) -> jax.Array:
    """The index uint8 of the entry of a small table that is nearest to each value; of two, the lower entry's."""
    order = np.argsort(table, kind="stable")
    rank = sum((values > edge).astype(jnp.uint8) for edge in decision_boundaries(table))
    return lookup(rank, order.astype(np.uint8)) if np.any(order != np.arange(len(order))) else rank


def lookup(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """`table[codes]` by a tree of selections on the bits of the codes, which every compiler fuses, unlike a gather."""
    level: list[Any] = list(table)
    bit = 0
    while len(level) > 1:
        level += level[-1:] * (len(level) % 2)
        odd = (codes >> np.uint8(bit)) & np.uint8(1) != 0
        level = [jnp.where(odd, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit += 1
    return level[0]
