"""What layers of one stack share: ranks padded to the largest, one scale a layer, and how factors start.

A layer with a smaller rank has zeros in the columns and rows that it lacks. Their gradients are zero, so they stay.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def live(ranks: Sequence[int], stack: tuple[int, ...]) -> jax.Array:
    """`[..., r]` bool: which of the largest rank's columns each layer has; `stack` is `()` or `(layers,)`."""
    return (jnp.arange(max(ranks))[None, :] < jnp.array(ranks)[:, None]).reshape(*stack, max(ranks))


def scales(ranks: Sequence[int], alphas: Sequence[float], stack: tuple[int, ...]) -> jax.Array:
    """`alpha / rank` of each layer, float32 `[...]`."""
    return jnp.array([a / max(r, 1) for r, a in zip(ranks, alphas, strict=True)], jnp.float32).reshape(stack)


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform within `1 / sqrt(fan_in)`: Kaiming with negative slope sqrt(5), as nn.Linear and PEFT have it."""
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)
