"""Learning from rewards of texts that the model writes: GRPO, DAPO's mean over tokens, Dr. GRPO and RLOO.

In each step the model writes several texts to each prompt, Python functions give them rewards, and a text becomes more
likely if its reward exceeds that of the other texts of its prompt. Shapes: B texts, G texts of each prompt, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import data
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import Batch, BatchInfo, HostArrays, Network, PyTree, Sums
from lowrank.data.row_format import ArraySpec
from lowrank.generation.sampling import Sampling
from lowrank.metrics.text import text_scores
from lowrank.objectives.causal_lm import check_decoder, language_token_nll
from lowrank.objectives.objective import COPIED, REFERENCE, Comparison, Objective, Rollout, Score
from lowrank.objectives.policy_losses import LOSSES, clipped_loss, divergence
from lowrank.objectives.preference_losses import check_not_negative, check_positive
from lowrank.objectives.rewards import Rewards, Sample

ADVANTAGE, OLD = "advantage", "old_log_probs"  # arrays of a batch
REWARD, LENGTH, CUT = "reward", "completions/mean_length", "completions/clipped_ratio"  # metrics of texts
STD, NO_STD = "reward_std", "frac_reward_zero_std"  # metrics of the groups of a batch


def grpo(
    reward_funcs: str | Sequence[str],
    reward_weights: Sequence[float] = (),
    loss: str = "dapo",
    group_size: int = 8,
    max_new: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    updates: int = 1,
) -> Objective:
    """One of `LOSSES` of texts of up to `max_new` tokens, `group_size` to each prompt, that the model writes.

    A text's reward is the sum of those of `reward_funcs`, see `lowrank.objectives.rewards`, times `reward_weights`.
    `beta` times an estimate of the divergence from the run's start is added to the loss of each token; with 0 nothing
    is compared with the start. `updates` steps learn from the same texts: from the second one on, the ratio of new and
    old probabilities is clipped to `1 - epsilon` and `1 + epsilon_high`, which is `epsilon` if it is not given.
    Probabilities are those of the logits divided by `temperature`, of the whole vocabulary also where `top_p` or
    `top_k` left tokens out.

    Differs from the papers: RLOO has the divergence in its loss, not in its rewards; DAPO's sampling of further texts
    where all rewards of a group are equal is left out.

    Raises UserError for a reward function that cannot be found, an unknown loss, and options out of their range.
    """
    if loss not in LOSSES:
        raise unknown("objective.loss", loss, LOSSES)
    for name, least, found in (("group_size", 2, group_size), ("max_new", 1, max_new), ("updates", 1, updates)):
        if found < least:
            raise UserError(f"objective.{name}={found} is below {least}")
    check_positive("temperature", temperature)
    check_not_negative("beta", beta)
    high = epsilon if epsilon_high is None else epsilon_high
    check_positive("epsilon", epsilon)
    check_positive("epsilon_high", high)
    rewards = Rewards(reward_funcs, reward_weights)
    policy = _Policy(loss, rewards, group_size, max_new, temperature, beta, (epsilon, high), updates)
    return policy.objective(Sampling(temperature=temperature, top_p=top_p, top_k=top_k))


class _Policy:
    """The functions of an objective whose loss is one of `LOSSES`."""

    def __init__(
        self,
        loss: str,
        rewards: Rewards,
        group_size: int,
        max_new: int,
        temperature: float,
        beta: float,
        clip: tuple[float, float],
        updates: int,
    ) -> None:
        self._variant, self._rewards, self._group, self._max_new = LOSSES[loss], rewards, group_size, max_new
        self._temperature, self._beta, self._clip, self._updates = temperature, beta, clip, updates
        self._of_functions = [f"rewards/{name}/mean" for name in rewards.names]
        self._of_texts = (REWARD, *self._of_functions, LENGTH, CUT)
        self._means = (*self._of_texts, STD, NO_STD)

    def objective(self, sampling: Sampling) -> Objective:
        """The objective, whose texts are drawn by `sampling`."""
        number, per_token = ArraySpec("float32", per_token=False), ArraySpec("float32")
        arrays = dict.fromkeys((ADVANTAGE, *self._means), number) | ({OLD: per_token} if self._updates > 1 else {})
        old = OLD if self._updates > 1 else ""
        return Objective(
            row_format=data.prompt_rows("grpo", self._group, self._max_new, arrays),
            loss=self.loss,
            row_sums=self.row_sums,
            batch_info=self.batch_info,
            score=Score(self.score_sums, self.scores, {REWARD: "max"}),
            check_model=check_decoder,
            vocabulary_logits=True,
            score_texts=_score_texts,
            comparison=Comparison(self.log_probs, COPIED if self._beta else ""),
            rollout=Rollout(self._max_new, sampling, self.judge, self.compare, self._updates, old),
        )

    def judge(self, samples: Sequence[Sample]) -> HostArrays:
        """The reward of each text, in all and by each function, its tokens, and whether it was cut off."""
        rewards_BxF = self._rewards(samples)
        tokens_B = np.array([float(len(s.ids)) for s in samples])
        cut_B = np.array([float(not s.ended) for s in samples])
        columns = (rewards_BxF @ self._rewards.weights, *rewards_BxF.T, tokens_B, cut_B)
        return dict(zip(self._of_texts, columns, strict=True))

    def compare(self, batch: HostArrays) -> HostArrays:
        """The advantage of each text, the deviation of all rewards, and the share of groups whose rewards are equal."""
        rewards_PxG = batch[REWARD].astype(np.float64).reshape(-1, self._group)
        whole_P = batch["valid"].reshape(-1, self._group)[:, 0] == 1
        equal_P = np.ptp(rewards_PxG, axis=-1) == 0
        rows = np.ones(batch[REWARD].shape)
        found = {ADVANTAGE: np.where(equal_P[:, None], 0.0, self._variant.advantages(rewards_PxG)).reshape(-1)}
        found |= {STD: rows * rewards_PxG[whole_P].std(ddof=1), NO_STD: rows * equal_P[whole_P].mean()}
        return {name: x.astype(np.float32) for name, x in found.items()}

    def log_probs(self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> jax.Array:
        """`[B, T]`: the log-probability of each token of the texts, and 0 elsewhere."""
        return -language_token_nll(network, params, batch, chunk_tokens, self._temperature)

    def loss(self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> Sums:
        """The losses, summed over the texts, with rewards, the divergence and clipped shares as metrics."""
        total_B, weight_B, per_token = self._losses(network, params, batch, chunk_tokens)
        learned_BxT, valid_B = batch["weights"], batch["valid"].astype(jnp.float32)
        rows, tokens = jnp.sum(valid_B), jnp.sum(learned_BxT)
        metrics = {name: (jnp.sum(batch[name] * valid_B), rows) for name in self._means}
        metrics |= {name: (jnp.sum(x_BxT * learned_BxT), tokens) for name, x_BxT in per_token.items()}
        return Sums(jnp.sum(total_B), jnp.sum(weight_B), metrics)

    def row_sums(
        self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """`(losses, weights)` `[B]`."""
        return self._losses(network, params, batch, chunk_tokens)[:2]

    def _losses(
        self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """`(losses [B], weights [B], metrics of tokens [B, T])`."""
        log_probs_BxT, learned_BxT = self.log_probs(network, params, batch, chunk_tokens), batch["weights"]
        old_BxT = batch[OLD] if self._updates > 1 else jax.lax.stop_gradient(log_probs_BxT)
        share_B, weight_B = self._shares(batch)
        log_ratios_BxT = log_probs_BxT - old_BxT
        first_BxT = learned_BxT  # where a loss counts: each token's, or that of the text once
        if self._variant.whole:
            log_ratios_BxT = jnp.broadcast_to(jnp.sum(log_ratios_BxT, axis=-1, keepdims=True), learned_BxT.shape)
            first_BxT = learned_BxT * (jnp.cumsum(learned_BxT, axis=-1) == 1)
        losses_BxT, low_BxT, high_BxT = clipped_loss(log_ratios_BxT, batch[ADVANTAGE][:, None], *self._clip)
        total_B = jnp.sum(losses_BxT * first_BxT, axis=-1) * share_B
        clipped = {"low_mean": low_BxT, "high_mean": high_BxT, "region_mean": low_BxT + high_BxT}
        metrics = {f"clip_ratio/{name}": x for name, x in clipped.items()}
        if self._beta:
            metrics["kl"] = divergence(log_probs_BxT, batch[REFERENCE])
            total_B += self._beta * jnp.sum(metrics["kl"] * learned_BxT, axis=-1) * share_B
        return total_B, weight_B, metrics

    def _shares(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return self._variant.shares(jnp.sum(batch["weights"].astype(jnp.float32), axis=-1), self._max_new)

    def batch_info(self, batch: Batch) -> BatchInfo:
        """What methods may read of a batch."""
        return BatchInfo(batch["segments"], jnp.sum(self._shares(batch)[1]), batch["prompt"])

    def score_sums(self, network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> Any:
        """The sums over held-out texts that `scores` reads."""
        del network, params, chunk_tokens  # they have written the texts already
        valid_B = batch["valid"].astype(jnp.float32)
        return [jnp.sum(batch[name] * valid_B) for name in self._of_texts], jnp.sum(valid_B)

    def scores(self, sums: Any) -> dict[str, float]:
        """The mean reward of held-out texts, in all and by each function, their mean length, and `texts`."""
        totals, texts = sums
        means = {name: float(total / texts) for name, total in zip(self._of_texts, totals, strict=True)}
        return {**means, "texts": float(texts)}


def _score_texts(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Those of `text_scores`; none for records without answers."""
    return text_scores(texts, references) if all(references) else {}
