"""What layers of one stack share: ranks padded to the largest, one scale a layer, and how factors start.

A layer with a smaller rank has zeros in the columns and rows that it lacks. Their gradients are zero, so they stay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def rank_mask(ranks: Sequence[int], stack: tuple[int, ...]) -> jax.Array:
    """`[..., r]` bool: which of the largest rank's columns each layer has; `stack` is `()` or `(layers,)`."""
    return (jnp.arange(max(ranks))[None, :] < jnp.array(ranks)[:, None]).reshape(*stack, max(ranks))


def lora_scales(ranks: Sequence[int], alphas: Sequence[float], stack: tuple[int, ...]) -> jax.Array:
    """`alpha / rank` of each layer, float32 `[...]`."""
    return jnp.array([a / max(r, 1) for r, a in zip(ranks, alphas, strict=True)], jnp.float32).reshape(stack)


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform within `1 / sqrt(fan_in)`: Kaiming with negative slope sqrt(5), as nn.Linear and PEFT have it."""
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def apply_per_matrix(fn: Callable[..., Any], *matrices: jax.Array) -> Any:
    """`fn` of matrices `[..., m, n]` with equal leading axes; on a CPU, one matrix at a time.

    jaxlib's batched QR, eigh and solve wait in the CPU's thread pool for threads of that pool: two of them in one
    program on two cores wait forever.
    """
    stack = matrices[0].shape[:-2]
    if not stack:
        return fn(*matrices)

    def one_by_one(*matrices: jax.Array) -> Any:
        flat = [x.reshape(-1, *x.shape[-2:]) for x in matrices]
        made = jax.lax.map(lambda parts: fn(*parts), tuple(flat))
        return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), made)

    return jax.lax.platform_dependent(*matrices, cpu=one_by_one, default=fn)
