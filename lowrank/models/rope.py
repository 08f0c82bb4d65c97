"""Rotary positions (Su et al. 2021, arXiv:2104.09864) in the half-split layout of transformers, and their scaling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for long contexts: `linear` divides all by `factor`; `llama3` only the low ones.

    `low`, `high` and `original_positions` say where `llama3` starts and stops: wavelengths above
    `original_positions / low` are divided, those below `original_positions / high` stay, between them it is smooth.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """The angle per position of each pair of dimensions, float32 `[head_dim / 2]`.

    Rounded to float32 where transformers rounds: a last bit here is, hundreds of positions on, a wrong angle.
    """
    powers = theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim).astype(np.float64)
    f = 1 / powers.astype(np.float32)
    if scaling is None:
        return f
    return f / scaling.factor if scaling.kind == "linear" else _llama3(f, scaling)


def _llama3(f: np.ndarray, s: RopeScaling) -> np.ndarray:
    turns = s.original_positions / (2 * math.pi / f)  # how often a pair turns within the original context
    keep = np.clip((turns - s.low) / (s.high - s.low), 0, 1)
    return keep * f + (1 - keep) * f / s.factor


def tables(positions_BxT: jax.Array, frequencies_F: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """`(cos, sin)` of every position's angles, float32 `[B, T, 1, F]`, ready to meet `[B, T, heads, 2F]`."""
    angles = positions_BxT.astype(jnp.float32)[..., None, None] * frequencies_F[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns dimension i with i + H/2 by their angle, in float32; the result has the dtype of `x`."""
    a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxH.dtype)
