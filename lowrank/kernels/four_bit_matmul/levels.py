"""The levels of codes in the registers of a kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def values_of(code: jax.Array, levels: Sequence[float]) -> jax.Array:
    """`levels[code]`: arithmetic where the levels are a step apart, and a tree of selections elsewhere."""
    step = levels[1] - levels[0]
    if all(level == levels[0] + i * step for i, level in enumerate(levels)):
        return code.astype(jnp.float32) * step + levels[0]
    values: list[Any] = list(levels)
    for bit in range(4):
        odd = (code >> bit) & 1 != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]
