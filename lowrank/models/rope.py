"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in the half-split layout of transformers.

Shapes: B rows, T tokens, N heads, H head width, F <= H / 2 frequencies.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.models.rope_scaling import KINDS, RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None, length: Any = 0) -> Any:
    """The angle per position of each pair of dimensions, float32 `[F]`.

    A scaling that depends on the length of a row, int32 `[B, 1]`, gives `[B, F]`. It is rounded to float32 where
    transformers rounds: an error in the last bit becomes a wrong angle hundreds of positions later.
    """
    powers = theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim).astype(np.float64)
    powers = powers.astype(np.float32)
    return 1 / powers if scaling is None else KINDS[scaling.kind].frequencies(powers, theta, scaling, length)


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
