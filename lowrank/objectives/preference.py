"""Preferences: of two answers to a prompt, the chosen one becomes more likely than the rejected one.

Both answers are one row, so they stay together in batches, microbatches and on a mesh, and one forward pass reads them.
Shapes: B pairs, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import data
from lowrank.core import config_schema
from lowrank.core.errors import unknown
from lowrank.core.typing import Batch, BatchInfo, Network, PyTree, Sums
from lowrank.metrics.text import text_scores
from lowrank.objectives.causal_lm import check_decoder, language_row_sums
from lowrank.objectives.objective import COPIED, REFERENCE, STORED, Comparison, Objective, Observe, Score
from lowrank.objectives.preference_losses import LOSSES, PairLoss, Pairs, check_not_negative

ROUNDING = 2e-6  # of a log-probability in float32: two programs that read the same answers differ by up to this
SHIFT = "shift"  # the array of a batch with the mean reward of all its pairs


def preference(loss: str = "dpo", reference: str = STORED, sft: float = 0.0, **options: Any) -> Objective:
    """A loss of pairs, one of `LOSSES` with its `options`, such as `beta`.

    `sft` times the mean loss of the chosen answer's tokens is added, which keeps the answer likely. `reference` is
    `stored`, with which each record's log-probabilities are computed once, before step 1, or `copied`, with which a
    copy of the trained leaves computes them in each step. Raises UserError for an unknown loss or option.
    """
    if loss not in LOSSES:
        raise unknown("objective.loss", loss, LOSSES)
    if reference not in (STORED, COPIED):
        raise unknown("objective.reference", reference, (STORED, COPIED))
    check_not_negative("sft", sft)
    value = config_schema.call_with_group(LOSSES[loss], options, "objective")
    pair_losses = _PairLosses(value, sft)
    return Objective(
        row_format=data.PAIRS,
        loss=pair_losses.loss,
        row_sums=pair_losses.row_sums,
        batch_info=pair_info,
        score=Score(pair_losses.score_sums, pair_scores, PAIR_SCORES),
        check_model=check_decoder,
        vocabulary_logits=True,
        score_texts=text_scores,
        comparison=_comparison(value, reference),
    )


class _PairLosses:
    """The functions of an objective whose loss is `value`, plus `sft` times the chosen answer's mean loss."""

    def __init__(self, value: PairLoss, sft: float) -> None:
        self._value, self._sft = value, sft

    def row_sums(
        self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """`(losses, weights)` `[B]`."""
        valid_B = batch["valid"].astype(jnp.float32)
        return self._losses(self._pairs(network, params, batch, chunk_tokens)) * valid_B, valid_B

    def loss(self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> Sums:
        """The losses, summed over the pairs, with rewards and log-probabilities as metrics."""
        valid_B = batch["valid"].astype(jnp.float32)
        pairs = self._pairs(network, params, batch, chunk_tokens)
        tie_B = ROUNDING * self._value.beta * (jnp.abs(pairs.chosen) + jnp.abs(pairs.rejected))
        means = reward_means(*self._value.rewards(pairs), tie_B)
        means |= {"logps/chosen": pairs.chosen, "logps/rejected": pairs.rejected}
        return sums_over_pairs(self._losses(pairs), means, valid_B)

    def score_sums(self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> Any:
        """The sums that `pair_scores` reads."""
        sums = self.loss(network, params, batch, chunk_tokens)
        return score_sums(sums)

    def _losses(self, pairs: Pairs) -> jax.Array:
        losses_B = self._value.loss(pairs)
        return losses_B - self._sft * pairs.means.chosen if self._sft else losses_B

    def _pairs(self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> Pairs:
        logps_Bx2, tokens_Bx2 = answer_log_probs(network, params, batch, chunk_tokens)
        none_Bx2 = jnp.zeros_like(logps_Bx2)
        reference_Bx2 = batch[REFERENCE] if self._value.reference else none_Bx2
        shift = batch[SHIFT] if self._value.shifted else 0.0
        columns = [x[:, i] for x in (logps_Bx2, reference_Bx2, jnp.maximum(tokens_Bx2, 1)) for i in (0, 1)]
        return Pairs(*columns)._replace(shift=shift)


def answer_log_probs(network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> tuple[jax.Array, jax.Array]:
    """`(log-probabilities, tokens)` of the chosen and the rejected answer, both `[B, 2]`; sums in float32."""
    nll, weights = language_row_sums(network, params, _as_rows(batch, data.PAIRS.per_token), chunk_tokens)
    return -nll.reshape(-1, 2), weights.reshape(-1, 2)


def _comparison(value: PairLoss, reference: str) -> Comparison | None:
    def row_values(network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> jax.Array:
        return answer_log_probs(network, params, batch, chunk_tokens)[0]

    def mean_reward(observe: Observe, batch: Batch) -> Mapping[str, jax.Array]:
        valid_B = batch["valid"].astype(jnp.float32)
        ratios_B = jnp.sum(observe(batch) - batch[REFERENCE], axis=-1)
        mean = value.beta * jnp.sum(ratios_B * valid_B) / (2 * jnp.maximum(jnp.sum(valid_B), 1))
        return {SHIFT: jnp.full(len(valid_B), mean)}

    if not value.reference:
        return None
    return Comparison(row_values, reference, mean_reward) if value.shifted else Comparison(row_values, reference)


def _as_rows(batch: Batch, names: Any) -> dict[str, jax.Array]:
    """These arrays `[B, 2, T]` as `[2 B, T]`."""
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names}


def pair_info(batch: Batch) -> BatchInfo:
    """What methods may read of a batch of pairs."""
    rows = _as_rows(batch, ("segments", "prompt"))
    return BatchInfo(rows["segments"], jnp.sum(batch["valid"].astype(jnp.float32)), rows["prompt"])


def reward_means(chosen_B: jax.Array, rejected_B: jax.Array, tie_B: jax.Array | float = 0.0) -> dict[str, jax.Array]:
    """The metrics of rewards, one value per pair. A margin of at most `tie` is a tie, which is no win."""
    return {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": chosen_B - rejected_B,
        "rewards/accuracies": (chosen_B - rejected_B > tie_B).astype(jnp.float32),
    }


def sums_over_pairs(losses_B: jax.Array, means: Mapping[str, jax.Array], valid_B: jax.Array) -> Sums:
    """The sums of losses and of metrics over the valid pairs."""
    weight = jnp.sum(valid_B)
    metrics = {name: (jnp.sum(x_B * valid_B), weight) for name, x_B in means.items()}
    return Sums(jnp.sum(losses_B * valid_B), weight, metrics)


def score_sums(sums: Sums) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`(losses, wins, margins, pairs)` of held-out pairs."""
    wins, margins = (sums.metrics[f"rewards/{name}"][0] for name in ("accuracies", "margins"))
    return sums.total, wins, margins, sums.weight


def pair_scores(sums: tuple[np.ndarray, ...]) -> dict[str, float]:
    """`accuracy` (the share of pairs whose chosen answer has the higher reward), `margin`, `loss` and `pairs`."""
    loss, wins, margins, pairs = (float(x) for x in sums)
    return {"accuracy": wins / pairs, "margin": margins / pairs, "loss": loss / pairs, "pairs": pairs}


PAIR_SCORES = {"accuracy": "max", "margin": "max", "loss": "min"}
