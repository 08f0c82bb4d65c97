"""Losses of single answers that are labeled as desirable or not, and of the rewards of pairs: pure functions.

Shapes: every array is `[B]`, one value per answer or per pair.
"""

import jax
import jax.numpy as jnp


def kto_loss(
    ratios: jax.Array,
    desirable: jax.Array,
    z: jax.Array,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimization (arXiv:2402.01306): the loss of each answer.

    `ratios` are log-ratios of policy and reference; `z` estimates how far the policy is from the reference, and no
    gradient flows through it. A desirable answer loses `1 - s(beta (ratio - z))`, another
    one `1 - s(beta (z - ratio))`.
    """
    sign = jnp.where(desirable, 1.0, -1.0).astype(ratios.dtype)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight).astype(ratios.dtype)
    return weight * (1 - jax.nn.sigmoid(sign * beta * (ratios - z)))


def kto_reference_point(ratios: jax.Array, weights: jax.Array) -> jax.Array:
    """`z`, a scalar: the mean log-ratio of mismatched prompts and answers, weighted by `weights`, and at least 0."""
    mean = jnp.sum(ratios * weights) / jnp.maximum(jnp.sum(weights), 1e-8)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def reward_loss(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0, centering: float = 0.0
) -> jax.Array:
    """The Bradley-Terry loss of two rewards, `-log s(chosen - rejected - margin)`.

    `centering` times the square of the rewards' sum is added (arXiv:2312.09244), which keeps their mean near 0.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centering * jnp.square(chosen + rejected)
