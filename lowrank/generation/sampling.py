"""Sampling: the next token is drawn from logits. Shapes: B rows, V vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of sampling: greedy at temperature 0, else a draw from logits / temperature after both filters.

    `top_k` keeps the k most likely tokens (0: all); then `top_p` keeps the smallest set of the most likely ones whose
    probabilities reach `top_p` (1: all; Holtzman et al. 2020). Order and ties are as in transformers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} is below 0, which stands for greedy decoding")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is below 0 (0 keeps every token)")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is not in [0, 1]")


def keep_top_k(logits_BxV: jax.Array, k: int) -> jax.Array:
    """`logits`, with -inf below the k-th largest of each row (ties with it stay); 0 or k >= V keeps all."""
    if k == 0 or k >= logits_BxV.shape[-1]:
        return logits_BxV
    floor_Bx1 = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
    return jnp.where(logits_BxV < floor_Bx1, -jnp.inf, logits_BxV)


def keep_top_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    """`logits`, with -inf outside the smallest set of most likely tokens whose probabilities reach `p`; 1 keeps all.

    The most likely token always stays.
    """
    if p >= 1:
        return logits_BxV
    order_BxV = jnp.argsort(logits_BxV, axis=-1)
    tail_BxV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BxV, order_BxV, axis=-1), axis=-1), axis=-1)
    drop_BxV = (tail_BxV <= 1 - p).at[:, -1].set(False)
    drop_BxV = jnp.put_along_axis(jnp.zeros_like(drop_BxV), order_BxV, drop_BxV, axis=-1, inplace=False)
    return jnp.where(drop_BxV, -jnp.inf, logits_BxV)


def next_token(logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """`[B]` int32: one token per row, drawn with that row's own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = keep_top_p(keep_top_k(logits_BxV / sampling.temperature, sampling.top_k), sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)
