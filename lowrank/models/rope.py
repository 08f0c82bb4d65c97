"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in the half-split layout of transformers.

Shapes: B rows, T tokens, N heads, H head width, F = H / 2 frequencies.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for long contexts: `linear` divides all by `factor`; `llama3` only the low ones.

    `low`, `high` and `original_positions` set the limits of `llama3`: frequencies with wavelengths above
    `original_positions / low` are divided, those below `original_positions / high` stay, with a smooth step between.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """The angle per position of each pair of dimensions, float32 `[F]`.

    It is rounded to float32 where transformers rounds: an error in the last bit becomes a wrong angle hundreds of
    positions later.
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


def rope_tables(positions_BxT: jax.Array, frequencies_F: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """`(cos, sin)` of every position's angles, float32 `[B, T, 1, F]`, for queries and keys `[B, T, N, 2F]`."""
    angles = positions_BxT.astype(jnp.float32)[..., None, None] * frequencies_F[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dimension i with dimension i + H/2 by their angle, in float32; the result has the dtype of `x`."""
    a, b = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxNxH.dtype)
