"""Losses of texts that the model wrote and that have rewards: pure functions, and the table of their variants.

A text's advantage says by how much its reward exceeds that of the other texts of its prompt. Shapes: P prompts, G texts
of each prompt, B = P G texts, T tokens.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LEAST_STD = 1e-4  # is added to a standard deviation that rewards are divided by

Advantages = Callable[[np.ndarray], np.ndarray]  # rewards `[P, G]` -> advantages `[P, G]`
# (tokens of each text `[B]` float32, the largest number of tokens) -> (factor of a token's loss `[B]`, weight `[B]`)
Shares = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A variant: how advantages come from rewards, and what the loss is a mean of.

    The loss is the sum of the tokens' losses, each times its text's factor, divided by the sum of the texts' weights.
    """

    advantages: Advantages
    shares: Shares
    whole: bool = False  # whether the ratio of new and old probabilities is that of the whole text, or of each token


def centered(rewards: np.ndarray) -> np.ndarray:
    """The rewards minus the mean of their group."""
    return rewards - rewards.mean(-1, keepdims=True)


def standardized(rewards: np.ndarray) -> np.ndarray:
    """The centered rewards, divided by the standard deviation of their group (that of a sample, plus 1e-4)."""
    return centered(rewards) / (rewards.std(-1, ddof=1, keepdims=True) + LEAST_STD)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """The rewards minus the mean of the others of their group."""
    G = rewards.shape[-1]
    return centered(rewards) * G / (G - 1)


def mean_of_texts(tokens: jax.Array, max_new: int) -> tuple[jax.Array, jax.Array]:
    """The mean over texts of the mean over a text's tokens."""
    del max_new
    return 1 / jnp.maximum(tokens, 1), _present(tokens)


def mean_of_tokens(tokens: jax.Array, max_new: int) -> tuple[jax.Array, jax.Array]:
    """The mean over the tokens of all texts."""
    del max_new
    return jnp.ones_like(tokens), tokens


def mean_of_places(tokens: jax.Array, max_new: int) -> tuple[jax.Array, jax.Array]:
    """The sum over tokens, divided by the number of tokens that the texts could have had."""
    return jnp.ones_like(tokens), max_new * _present(tokens)


def mean_of_sums(tokens: jax.Array, max_new: int) -> tuple[jax.Array, jax.Array]:
    """The mean over texts of the sum over a text's tokens."""
    del max_new
    return jnp.ones_like(tokens), _present(tokens)


def _present(tokens: jax.Array) -> jax.Array:
    return (tokens > 0).astype(jnp.float32)


LOSSES: dict[str, PolicyLoss] = {
    "dapo": PolicyLoss(standardized, mean_of_tokens),  # arXiv:2503.14476
    "dr_grpo": PolicyLoss(centered, mean_of_places),  # arXiv:2503.20783
    "grpo": PolicyLoss(standardized, mean_of_texts),  # arXiv:2402.03300
    "rloo": PolicyLoss(leave_one_out, mean_of_sums, whole=True),  # arXiv:2402.14740
}


def clipped_loss(
    log_ratios: jax.Array, advantages: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(loss, is_low, is_high)`: `-min(r A, clip(r, 1 - low, 1 + high) A)`, with r the ratio of new and old policy.

    `is_low` and `is_high` are 1 where the clip takes the gradient away: a text that is to become less likely, and is
    already, or one that is to become more likely.
    """
    ratios = jnp.exp(log_ratios)
    loss = -jnp.minimum(ratios * advantages, jnp.clip(ratios, 1 - low, 1 + high) * advantages)
    is_low, is_high = (ratios < 1 - low) & (advantages < 0), (ratios > 1 + high) & (advantages > 0)
    return loss, is_low.astype(jnp.float32), is_high.astype(jnp.float32)


def divergence(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """An estimate of the divergence from the reference, `exp(d) - d - 1` with d = reference - log-probability.

    It is never negative, and its mean over the model's own texts is that of the Kullback-Leibler divergence.
    """
    d = reference - log_probs
    return jnp.expm1(d) - d
