"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in the half-split layout of transformers.

Shapes: B rows, T tokens, N heads, H head width, F <= H / 2 frequencies.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for long contexts: `linear` divides all by `factor`; `llama3` only the low ones.

    `low`, `high` and `original_positions` set the limits of `llama3`: frequencies with wavelengths above
    `original_positions / low` are divided, those below `original_positions / high` stay, with a smooth step between.
    `longrope` (Ding et al. 2024, arXiv:2402.13753) divides frequency i by `short[i]`, and in rows beyond
    `original_positions` by `long[i]`; cosines and sines are multiplied by `attention_factor`.
    """

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float = 1.0


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, beyond: bool = False
) -> np.ndarray:
    """The angle per position of each pair of dimensions, float32 `[F]`; `beyond`: of rows that `longrope` stretches.

    It is rounded to float32 where transformers rounds: an error in the last bit becomes a wrong angle hundreds of
    positions later.
    """
    powers = theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim).astype(np.float64)
    f = 1 / powers.astype(np.float32)
    return f if scaling is None else KINDS[scaling.kind](f, scaling, beyond)


def _linear(f: np.ndarray, s: RopeScaling, beyond: bool) -> np.ndarray:
    del beyond
    return f / s.factor


def _llama3(f: np.ndarray, s: RopeScaling, beyond: bool) -> np.ndarray:
    del beyond
    turns = s.original_positions / (2 * math.pi / f)  # how often a pair turns within the original context
    keep = np.clip((turns - s.low) / (s.high - s.low), 0, 1)
    return keep * f + (1 - keep) * f / s.factor


def _longrope(f: np.ndarray, s: RopeScaling, beyond: bool) -> np.ndarray:
    return f / np.array(s.long if beyond else s.short, np.float32)


KINDS: dict[str, Callable[[np.ndarray, RopeScaling, bool], np.ndarray]] = {
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
}


def rope_tables(positions_BxT: jax.Array, frequencies: np.ndarray | jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(cos, sin)` of every position's angles, float32 `[B, T, 1, F]`, for queries and keys `[B, T, N, 2F]`.

    The frequencies are `[F]`, or `[B, F]` for each row.
    """
    angles = positions_BxT.astype(jnp.float32)[..., None, None] * frequencies.reshape(-1, 1, 1, frequencies.shape[-1])
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BxTxNxH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dimension i with dimension i + F by their angle, in float32; the result has the dtype of `x`.

    Dimensions from 2F on stay as they are.
    """
    x, rest = x_BxTxNxH[..., : 2 * cos.shape[-1]], x_BxTxNxH[..., 2 * cos.shape[-1] :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
