"""Sampling: the next token of each row is drawn from its logits by that row's own settings.

The settings are arrays, so that programs do not depend on them, and what no row asks for is not computed. Order and
ties are as in transformers. Shapes: B rows, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of one text: greedy at temperature 0, else a draw from logits / temperature after all filters.

    `top_k` keeps the k most likely tokens (0: all); then `top_p` keeps the smallest set of the most likely ones whose
    probabilities reach `top_p` (1: all; Holtzman et al. 2020); then `min_p` keeps those that are at least `min_p` times
    as likely as the most likely one (0: all; Nguyen et al. 2024, arXiv:2407.01082). Before all this,
    `repetition_penalty` divides the positive logits of tokens of the prompt and the text, and multiplies the negative
    ones (1: neither; Keskar et al. 2019, arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0, for greedy decoding, or a number above")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k} is not in [0, {2**31 - 1}] (0 keeps every token)")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is not in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0, and has no effect at 1")


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of `Sampling` of all rows."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_penalty_B: jax.Array


def stack_settings(samplings: Sequence[Sampling]) -> Settings:
    """The settings of several rows as NumPy arrays."""
    column = lambda name, dtype: np.array([getattr(s, name) for s in samplings], dtype)  # noqa: E731
    names = [field.name for field in dataclasses.fields(Sampling)]
    return Settings(*(column(name, np.int32 if name == "top_k" else np.float32) for name in names))


def next_tokens(logits_BxV: jax.Array, keys_B: jax.Array, settings: Settings, seen_BxV: jax.Array) -> jax.Array:
    """`[B]` int32: one token per row, drawn with that row's own key; `seen` are the tokens of its prompt and text."""
    logits_BxV = jax.lax.cond(
        jnp.any(settings.repetition_penalty_B != 1), penalize, lambda x, *_: x, logits_BxV, settings, seen_BxV
    )

    def draw(logits_BxV: jax.Array) -> jax.Array:
        filtered_BxV = filter_logits(logits_BxV, settings)
        return jax.vmap(jax.random.categorical)(keys_B, filtered_BxV).astype(jnp.int32)

    likeliest_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    sampled_B = settings.temperature_B > 0
    return jnp.where(sampled_B, jax.lax.cond(jnp.any(sampled_B), draw, lambda _: likeliest_B, logits_BxV), likeliest_B)


def penalize(logits_BxV: jax.Array, settings: Settings, seen_BxV: jax.Array) -> jax.Array:
    """The logits with those of seen tokens divided by the penalty if they are positive, else multiplied by it."""
    penalty_Bx1 = settings.repetition_penalty_B[:, None]
    penalized_BxV = jnp.where(logits_BxV < 0, logits_BxV * penalty_Bx1, logits_BxV / penalty_Bx1)
    return jnp.where(seen_BxV, penalized_BxV, logits_BxV)


def filter_logits(logits_BxV: jax.Array, settings: Settings) -> jax.Array:
    """Logits / temperature, with -inf for the tokens that a row's settings do not keep."""
    t_B = settings.temperature_B
    logits_BxV = logits_BxV / jnp.where(t_B > 0, t_B, 1)[:, None]
    ordered = jnp.any((settings.top_k_B > 0) | (settings.top_p_B < 1))
    kept_BxV = jax.lax.cond(ordered, _top, lambda x, _: jnp.ones(x.shape, bool), logits_BxV, settings)
    # the ratio of two probabilities is that of their exponentials, whatever has been left out before
    top_Bx1 = jnp.max(logits_BxV, axis=-1, keepdims=True)
    kept_BxV &= ~(jnp.exp(logits_BxV - top_Bx1) < settings.min_p_B[:, None])
    return jnp.where(kept_BxV, logits_BxV, -jnp.inf)


def _top(logits_BxV: jax.Array, settings: Settings) -> jax.Array:
    """The tokens that top-k keeps, among them those that top-p keeps; the most likely one always stays."""
    V = logits_BxV.shape[-1]
    order_BxV = jnp.argsort(logits_BxV, axis=-1)
    ascending_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1)
    k_B = jnp.where(settings.top_k_B > 0, jnp.minimum(settings.top_k_B, V), V)
    floor_Bx1 = jnp.take_along_axis(ascending_BxV, V - k_B[:, None], axis=-1)
    kept_BxV = ascending_BxV >= floor_Bx1  # ties with the k-th stay
    tail_BxV = jnp.cumsum(jax.nn.softmax(jnp.where(kept_BxV, ascending_BxV, -jnp.inf), axis=-1), axis=-1)
    p_Bx1 = settings.top_p_B[:, None]
    kept_BxV &= ((tail_BxV > 1 - p_Bx1) | (p_Bx1 >= 1)).at[:, -1].set(True)
    return jnp.put_along_axis(jnp.zeros_like(kept_BxV), order_BxV, kept_BxV, axis=-1, inplace=False)
