"""A model of rewards: a new head gives a text one number, and the chosen answer of a pair the larger one.

Shapes: B pairs, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank import data, models
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, BatchInfo, Network, PyTree, Sums
from lowrank.objectives.objective import Objective, Score
from lowrank.objectives.preference import PAIR_SCORES, pair_scores, reward_means, score_sums, sums_over_pairs
from lowrank.objectives.preference_losses import check_not_negative
from lowrank.objectives.unpaired_losses import reward_loss


def reward(centering: float = 0.0) -> Objective:
    """`-log s(chosen - rejected - margin)` of the rewards of a new head, which is trained with every method.

    The reward is read at the last token of a sequence. `margin` is that of the record, or 0. `centering` times the
    square of the rewards' sum is added (arXiv:2312.09244; 0.01), which keeps rewards near 0.
    """
    check_not_negative("centering", centering)

    def losses(network: Network, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rewards_Bx2 = _rewards(network, params, batch)
        margins_B = batch["margin"][:, 0]
        return reward_loss(rewards_Bx2[:, 0], rewards_Bx2[:, 1], margins_B, centering), rewards_Bx2

    def row_sums(network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> tuple[jax.Array, jax.Array]:
        del chunk_tokens  # one logit a row
        valid_B = batch["valid"].astype(jnp.float32)
        return losses(network, params, batch)[0] * valid_B, valid_B

    def loss(network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> Sums:
        del chunk_tokens
        losses_B, rewards_Bx2 = losses(network, params, batch)
        means = reward_means(rewards_Bx2[:, 0], rewards_Bx2[:, 1])
        return sums_over_pairs(losses_B, means, batch["valid"].astype(jnp.float32))

    return Objective(
        row_format=data.SCORED_PAIRS,
        loss=loss,
        row_sums=row_sums,
        batch_info=_batch_info,
        score=Score(lambda *arguments: score_sums(loss(*arguments)), pair_scores, PAIR_SCORES),
        check_model=_check_model,
        vocabulary_logits=False,
        model_options=_model_options,
        trainable=("head/.*",),
    )


def _rewards(network: Network, params: PyTree, batch: Batch) -> jax.Array:
    """`[B, 2]` of `tokens` and `segments` `[B, 2, T]`, in float32."""
    tokens, segments = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "segments"))
    return network.apply({"params": params}, tokens, segments=segments)[:, 0].reshape(-1, 2)


def _batch_info(batch: Batch) -> BatchInfo:
    segments = batch["segments"].reshape(-1, batch["segments"].shape[-1])
    return BatchInfo(segments, jnp.sum(batch["valid"].astype(jnp.float32)))


def _model_options(labels: Sequence[str]) -> dict[str, Any]:
    """One output, whatever the data."""
    del labels
    return {"num_labels": 1}


def _check_model(name: str, config: Any) -> None:
    """Raises UserError for a model that does not read a text and its answer from left to right."""
    if not isinstance(config, models.DecoderConfig):
        raise UserError(f"{name} is an encoder, and a model of rewards is made of a decoder: name a decoder")
