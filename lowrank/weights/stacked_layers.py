"""Adapters of stacked layers: masks for ranks that differ, one scale per layer, initial factors, matrix functions.

A layer whose rank is below the largest of its stack has zeros in the columns and rows that it lacks. The gradients of
this padding are zero, so it stays zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def rank_mask(ranks: Sequence[int], stack: tuple[int, ...]) -> jax.Array:
    """`[..., r]` bool: True for the columns of the largest rank that each layer has; `stack` is `()` or `(layers,)`."""
    return (jnp.arange(max(ranks))[None, :] < jnp.array(ranks)[:, None]).reshape(*stack, max(ranks))


def lora_scales(ranks: Sequence[int], alphas: Sequence[float], stack: tuple[int, ...]) -> jax.Array:
    """`alpha / rank` of each layer, float32 `[...]`."""
    return jnp.array([a / max(r, 1) for r, a in zip(ranks, alphas, strict=True)], jnp.float32).reshape(stack)


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform values within `1 / sqrt(fan_in)`: Kaiming's init with a negative slope of sqrt(5), as in nn.Linear."""
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def apply_per_matrix(fn: Callable[..., Any], *matrices: jax.Array) -> Any:
    """`fn(*matrices)` for matrices `[..., m, n]` with equal leading axes; on a CPU, one matrix at a time.

    jaxlib's batched QR, eigh and solve run in the CPU's thread pool and wait for other threads of that pool. Two of
    them in one program on two cores wait forever.
    """
    stack = matrices[0].shape[:-2]
    if not stack:
        return fn(*matrices)

    def one_by_one(*matrices: jax.Array) -> Any:
        flat = [x.reshape(-1, *x.shape[-2:]) for x in matrices]
        results = jax.lax.map(lambda parts: fn(*parts), tuple(flat))
        return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), results)

    return jax.lax.platform_dependent(*matrices, cpu=one_by_one, default=fn)
