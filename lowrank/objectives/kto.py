"""Kahneman-Tversky optimization: answers that are labeled as desirable or not, without pairs (arXiv:2402.01306).

Each step also reads every prompt with the answer of the row before it, under the model and under the reference: their
mean log-ratio `z` of the whole batch tells how far the model has moved. Shapes: B answers, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import data
from lowrank.core.typing import Batch, BatchInfo, Network, PyTree, Sums
from lowrank.metrics.text import text_scores
from lowrank.objectives.causal_lm import check_decoder, language_row_sums
from lowrank.objectives.objective import COPIED, REFERENCE, Comparison, Objective, Observe, Score
from lowrank.objectives.preference_losses import check_positive
from lowrank.objectives.unpaired_losses import kto_loss, kto_reference_point

POINT, MARGIN = "reference_point", "margin_weight"  # arrays of a batch that `prepare` makes


def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """KTO's loss of single answers, with weights of the two classes; the reference is copied.

    The authors advise weights in proportion to which desirable answers count 1 to 4/3 times as much as the others, all
    taken together. Raises UserError for options that are not above 0.
    """
    options = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for name, value in options.items():
        check_positive(name, value)

    def row_sums(network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> tuple[jax.Array, jax.Array]:
        valid_B = batch["valid"].astype(jnp.float32)
        ratios_B = _log_probs(network, params, batch, chunk_tokens) - batch[REFERENCE]
        return kto_loss(ratios_B, batch["desirable"] == 1, batch[POINT], **options) * valid_B, valid_B

    def loss(network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> Sums:
        valid_B = batch["valid"].astype(jnp.float32)
        logps_B = _log_probs(network, params, batch, chunk_tokens)
        ratios_B, desirable_B = logps_B - batch[REFERENCE], batch["desirable"] == 1
        losses_B = kto_loss(ratios_B, desirable_B, batch[POINT], **options)
        metrics = _metrics(logps_B, beta * ratios_B, desirable_B, valid_B)
        weight = jnp.sum(valid_B)
        metrics["rewards/margins"] = jnp.sum(beta * ratios_B * batch[MARGIN]), weight
        metrics["kl"] = jnp.sum(batch[POINT] * valid_B), weight
        return Sums(jnp.sum(losses_B * valid_B), weight, metrics)

    def score_sums(network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> Any:
        ratios_B = _log_probs(network, params, batch, chunk_tokens) - batch[REFERENCE]
        return _score_sums(beta * ratios_B, batch["desirable"] == 1, batch["valid"].astype(jnp.float32))

    return Objective(
        row_format=data.JUDGED,
        loss=loss,
        row_sums=row_sums,
        batch_info=_batch_info,
        score=Score(score_sums, _scores, {"accuracy": "max", "margin": "max"}),
        check_model=check_decoder,
        vocabulary_logits=True,
        score_texts=text_scores,
        comparison=Comparison(_log_probs, COPIED, _prepare),
    )


def _log_probs(network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> jax.Array:
    """`[B]`: the log-probability of each answer, summed over its tokens."""
    return -language_row_sums(network, params, batch, chunk_tokens)[0]


def _batch_info(batch: Batch) -> BatchInfo:
    return BatchInfo(batch["segments"], jnp.sum(batch["valid"].astype(jnp.float32)), batch["prompt"])


def _prepare(observe: Observe, batch: Batch) -> Mapping[str, jax.Array]:
    """`z` for each row, and the weight of a reward in the difference of the classes' mean rewards."""
    valid_B, rows = batch["valid"].astype(jnp.float32), mismatched(batch)
    several = (jnp.sum(valid_B) > 1).astype(jnp.float32)  # a single row has no other answer
    z = kto_reference_point(observe(rows) - observe(rows, of_start=True), valid_B * several)
    desirable_B = (batch["desirable"] == 1) * valid_B
    shares = [x / jnp.maximum(jnp.sum(x), 1) for x in (desirable_B, valid_B - desirable_B)]
    return {POINT: jnp.full(len(valid_B), z), MARGIN: jnp.sum(valid_B) * (shares[0] - shares[1])}


def mismatched(batch: Batch) -> dict[str, jax.Array]:
    """The rows, each with its own prompt and the answer of the valid row before it; what exceeds T is cut off."""
    B, T = batch["tokens"].shape
    last = jnp.maximum(jnp.sum(batch["valid"]) - 1, 0)
    before_B = jnp.where(jnp.arange(B) == 0, last, jnp.arange(B) - 1)
    own_B = jnp.sum(batch["prompt"] & (batch["segments"] > 0), axis=1, dtype=jnp.int32)
    index_T = jnp.arange(T, dtype=jnp.int32)
    source_BxT = index_T[None] + (own_B[before_B] - own_B)[:, None]  # where the other answer's tokens lie in its row
    inside_BxT = source_BxT < T

    def joined(name: str, border_B: jax.Array, fill: int) -> jax.Array:
        other = jnp.take_along_axis(batch[name][before_B], jnp.clip(source_BxT, 0, T - 1), axis=1)
        other = jnp.where(inside_BxT, other, jnp.asarray(fill, other.dtype))
        return jnp.where(index_T[None] < border_B[:, None], batch[name], other)

    rows = {name: joined(name, own_B, 0) for name in ("tokens", "segments")}
    rows |= {name: joined(name, own_B - 1, 0) for name in ("targets", "weights")}  # of the token before, that is
    prompt_BxT = index_T[None] < own_B[:, None]
    positions_BxT = jnp.where(rows["segments"] > 0, index_T[None], 0)
    return {**batch, **rows, "prompt": prompt_BxT, "positions": positions_BxT}


def _metrics(logps_B: jax.Array, rewards_B: jax.Array, desirable_B: jax.Array, valid_B: jax.Array) -> dict[str, Any]:
    """The mean rewards and log-probabilities of each class."""
    found = {}
    for name, of_class in (("chosen", desirable_B), ("rejected", ~desirable_B)):
        weight_B = of_class * valid_B
        for metric, values_B in (("rewards", rewards_B), ("logps", logps_B)):
            found[f"{metric}/{name}"] = jnp.sum(values_B * weight_B), jnp.sum(weight_B)
    return found


def _score_sums(rewards_B: jax.Array, desirable_B: jax.Array, valid_B: jax.Array) -> tuple[jax.Array, ...]:
    """`(hits, rewards of desirable answers, their number, rewards of the others, their number)`."""
    hits_B = jnp.where(desirable_B, rewards_B > 0, rewards_B < 0)
    classes = (desirable_B * valid_B, ~desirable_B * valid_B)
    sums = [x for weight_B in classes for x in (jnp.sum(rewards_B * weight_B), jnp.sum(weight_B))]
    return jnp.sum(hits_B * valid_B), *sums


def _scores(sums: tuple[np.ndarray, ...]) -> dict[str, float]:
    """`accuracy` (the share of answers whose reward has the sign of their label), `margin` and `answers`."""
    hits, good, num_good, bad, num_bad = (float(x) for x in sums)
    margin = good / max(num_good, 1.0) - bad / max(num_bad, 1.0)
    return {"accuracy": hits / (num_good + num_bad), "margin": margin, "answers": num_good + num_bad}
