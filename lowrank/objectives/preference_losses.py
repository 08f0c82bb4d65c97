"""Losses of pairs: pure functions of the log-probabilities of two answers, those of a reference, and their lengths.

Each function of `LOSSES` checks its options and returns a `PairLoss`; a new loss is one function and one line there.
Log-probabilities are sums over an answer's tokens, in nats. Below, `a` and `c` are the log-ratios of policy and
reference of the chosen and of the rejected answer, and `h = beta * (a - c)`. Shapes: every array is `[B]`, one value
per pair.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError

LOG_HALF = -math.log(2)


class Pairs(NamedTuple):
    """What is known of pairs of a chosen and a rejected answer."""

    chosen: jax.Array  # the policy's log-probability
    rejected: jax.Array
    chosen_reference: jax.Array | float = 0.0  # the reference's; 0 for losses without a reference
    rejected_reference: jax.Array | float = 0.0
    chosen_tokens: jax.Array | float = 1.0  # the tokens that the log-probabilities are summed over
    rejected_tokens: jax.Array | float = 1.0
    shift: jax.Array | float = 0.0  # the mean reward that BCO takes off both rewards; no gradient flows through it

    @property
    def ratios(self) -> tuple[jax.Array, jax.Array]:
        """`(a, c)`: the log-ratios of policy and reference."""
        return self.chosen - self.chosen_reference, self.rejected - self.rejected_reference

    @property
    def alone(self) -> "Pairs":
        """The pairs without a reference."""
        return self._replace(chosen_reference=0.0, rejected_reference=0.0)

    @property
    def means(self) -> "Pairs":
        """The pairs with means over tokens in the place of sums."""
        return self._replace(
            chosen=self.chosen / self.chosen_tokens,
            rejected=self.rejected / self.rejected_tokens,
            chosen_reference=self.chosen_reference / self.chosen_tokens,
            rejected_reference=self.rejected_reference / self.rejected_tokens,
        )


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """A loss of pairs, and the rewards that its users look at."""

    loss: Callable[[Pairs], jax.Array]  # pairs -> `[B]`
    beta: float  # a reward is this times a log-ratio
    reference: bool = True  # whether it compares with a reference
    per_token: bool = False  # whether rewards are those of means over tokens, as where no reference weighs the lengths
    shifted: bool = False  # whether it reads `Pairs.shift`

    def rewards(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        """`(chosen, rejected)`, each `[B]`: beta times the log-ratios, or the log-probabilities without a reference."""
        pairs = pairs if self.reference else pairs.alone
        chosen, rejected = (pairs.means if self.per_token else pairs).ratios
        return self.beta * chosen, self.beta * rejected


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """Direct preference optimization (arXiv:2305.18290), `-log s(h)`.

    A `label_smoothing` of e, the share of pairs that are labeled the wrong way round, gives the conservative form
    `-(1 - e) log s(h) - e log s(-h)`.
    """
    _check(beta, label_smoothing)

    def loss(pairs: Pairs) -> jax.Array:
        h = _margin(pairs, beta)
        return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)

    return PairLoss(loss, beta)


def robust(beta: float = 0.1, label_smoothing: float = 0.1) -> PairLoss:
    """Robust DPO (arXiv:2403.00409): unbiased if the share `label_smoothing` of labels is wrong; may be negative."""
    _check(beta, label_smoothing)

    def loss(pairs: Pairs) -> jax.Array:
        h = _margin(pairs, beta)
        right, wrong = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
        return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)

    return PairLoss(loss, beta)


def hinge(beta: float = 0.1) -> PairLoss:
    """The hinge of SLiC (arXiv:2305.10425), `max(0, 1 - h)`."""
    _check(beta)
    return PairLoss(lambda pairs: jax.nn.relu(1 - _margin(pairs, beta)), beta)


def ipo(beta: float = 0.1, per_token: bool = True) -> PairLoss:
    """Identity preference optimization (arXiv:2310.12036), `(a - c - 1 / (2 beta))^2`.

    With `per_token`, a and c are means over the answers' tokens, so that beta means the same for all lengths.
    """
    _check(beta)

    def loss(pairs: Pairs) -> jax.Array:
        return jnp.square(_margin(pairs.means if per_token else pairs, 1.0) - 1 / (2 * beta))

    return PairLoss(loss, beta)


def exo(beta: float = 0.1, label_smoothing: float = 1e-3) -> PairLoss:
    """Efficient exact optimization (arXiv:2402.00856): the reverse divergence from smoothed labels.

    Raises UserError for a `label_smoothing` of 0, whose loss is infinite.
    """
    _check(beta, label_smoothing)
    if label_smoothing == 0:
        raise UserError("objective.label_smoothing=0 makes the loss of exo infinite: set it above 0, such as 0.001")
    right, wrong = math.log1p(-label_smoothing), math.log(label_smoothing)

    def loss(pairs: Pairs) -> jax.Array:
        h = _margin(pairs, beta)
        chosen = jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - right)
        return chosen + jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - wrong)

    return PairLoss(loss, beta)


def nca(beta: float = 0.1) -> PairLoss:
    """Noise-contrastive alignment of pairs (arXiv:2402.05369): the chosen answer may not become less likely."""
    _check(beta)

    def loss(pairs: Pairs) -> jax.Array:
        a, c = pairs.ratios
        negatives = jax.nn.log_sigmoid(-beta * a) + jax.nn.log_sigmoid(-beta * c)
        return -jax.nn.log_sigmoid(beta * a) - 0.5 * negatives

    return PairLoss(loss, beta)


def bco(beta: float = 0.1, shift: bool = True) -> PairLoss:
    """Binary classifier optimization (arXiv:2404.04656): `-log s(beta a - d) - log s(d - beta c)`.

    With `shift`, d is the mean reward of the step's whole batch, both answers alike; without, it is 0.
    """
    _check(beta)

    def loss(pairs: Pairs) -> jax.Array:
        a, c = pairs.ratios
        return -jax.nn.log_sigmoid(beta * a - pairs.shift) - jax.nn.log_sigmoid(pairs.shift - beta * c)

    return PairLoss(loss, beta, shifted=shift)


def apo_zero(beta: float = 0.1) -> PairLoss:
    """Anchored preference optimization (arXiv:2408.06266) where the chosen answers are better than the model's own."""
    _check(beta)

    def loss(pairs: Pairs) -> jax.Array:
        a, c = pairs.ratios
        return 1 - jax.nn.sigmoid(beta * a) + jax.nn.sigmoid(beta * c)

    return PairLoss(loss, beta)


def apo_down(beta: float = 0.1) -> PairLoss:
    """Anchored preference optimization (arXiv:2408.06266) where the chosen answers are worse than the model's own."""
    _check(beta)

    def loss(pairs: Pairs) -> jax.Array:
        return jax.nn.sigmoid(beta * pairs.ratios[0]) + 1 - jax.nn.sigmoid(_margin(pairs, beta))

    return PairLoss(loss, beta)


def dpo_norm(beta: float = 0.1) -> PairLoss:
    """DPO on log-ratios that are means over the answers' tokens, so that long answers have no larger margins."""
    _check(beta)
    return PairLoss(lambda pairs: -jax.nn.log_sigmoid(_margin(pairs.means, beta)), beta)


def dpop(beta: float = 0.1, penalty: float = 5.0) -> PairLoss:
    """DPO-positive (arXiv:2402.13228): `penalty` times the fall of the chosen log-probability is taken off `a - c`."""
    _check(beta, penalty=penalty)

    def loss(pairs: Pairs) -> jax.Array:
        fall = jax.nn.relu(pairs.chosen_reference - pairs.chosen)
        return -jax.nn.log_sigmoid(_margin(pairs, beta) - beta * penalty * fall)

    return PairLoss(loss, beta)


def simpo(beta: float = 2.0, gamma_ratio: float = 0.5) -> PairLoss:
    """SimPO (arXiv:2405.14734), without a reference: `-log s(beta (mean w - mean l - gamma_ratio))`.

    The margin gamma of the paper is `beta * gamma_ratio`.
    """
    _check(beta, gamma_ratio=gamma_ratio)

    def loss(pairs: Pairs) -> jax.Array:
        return -jax.nn.log_sigmoid(_margin(pairs.alone.means, beta) - beta * gamma_ratio)

    return PairLoss(loss, beta, reference=False, per_token=True)


def orpo(beta: float = 0.1) -> PairLoss:
    """ORPO (arXiv:2403.07691), without a reference: the chosen answer's mean loss, and `-beta log s(log odds ratio)`.

    Odds are those of mean log-probabilities per token. The first term is that of the chosen answer's tokens.
    """
    _check(beta)

    def loss(pairs: Pairs) -> jax.Array:
        w, l = pairs.means.chosen, pairs.means.rejected  # noqa: E741
        log_odds = (w - l) - (log1mexp(w) - log1mexp(l))
        return -w - beta * jax.nn.log_sigmoid(log_odds)

    return PairLoss(loss, beta, reference=False, per_token=True)


def cpo(beta: float = 0.1, alpha: float = 1.0) -> PairLoss:
    """CPO (arXiv:2401.08417), without a reference: DPO's loss of the sums, and `alpha` times the chosen mean loss."""
    _check(beta, alpha=alpha)

    def loss(pairs: Pairs) -> jax.Array:
        return -jax.nn.log_sigmoid(_margin(pairs.alone, beta)) - alpha * pairs.means.chosen

    return PairLoss(loss, beta, reference=False)


LOSSES: dict[str, Callable[..., PairLoss]] = {
    "dpo": dpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo": exo,
    "nca": nca,
    "bco": bco,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "dpo_norm": dpo_norm,
    "dpop": dpop,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
}


def log1mexp(x: jax.Array) -> jax.Array:
    """`log(1 - exp(x))` for `x < 0`, exact near 0 and far from it; above -1e-7 it is that of -1e-7."""
    x = jnp.minimum(x, -1e-7)  # a log-probability that has rounded to 0 would give an infinity
    near = x > LOG_HALF
    return jnp.where(
        near, jnp.log(-jnp.expm1(jnp.where(near, x, LOG_HALF))), jnp.log1p(-jnp.exp(jnp.where(near, LOG_HALF, x)))
    )


def check_positive(name: str, value: float) -> None:
    """Raises UserError unless the option is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise UserError(f"objective.{name}={value} must be above 0")


def check_not_negative(name: str, value: float) -> None:
    """Raises UserError unless the option is a finite number of 0 or more."""
    if not 0 <= value < float("inf"):
        raise UserError(f"objective.{name}={value} must be 0 or more")


def _margin(pairs: Pairs, beta: float) -> jax.Array:
    """`beta * (a - c)`."""
    a, c = pairs.ratios
    return beta * (a - c)


def _check(beta: float, label_smoothing: float = 0.0, **not_negative: float) -> None:
    check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"objective.label_smoothing={label_smoothing} must be in [0, 0.5)")
    for name, value in not_negative.items():
        check_not_negative(name, value)
