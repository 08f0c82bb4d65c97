"""A preference objective in one file, for the contract tests: the two answers of a pair are one row `[2, T]`.

The loss of a pair is `-log sigmoid(beta * (w - l))`, with w and l the mean log-probabilities of the chosen and of the
rejected answer (SimPO, arXiv:2405.14734, without its margin). Shapes: B rows, T tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.typing import BatchInfo, Sums
from lowrank.data.language import LANGUAGE, LanguageEncoder, language_encoder
from lowrank.data.row_format import RowFormat
from lowrank.objectives import Objective, Score
from lowrank.objectives.causal_lm import check_decoder, language_row_sums


@dataclasses.dataclass(frozen=True)
class PairEncoder(LanguageEncoder):
    """The record's completion as the chosen answer, and the other animal as the rejected one."""

    def __call__(self, record, where):
        other = {" the cat": " the dog .", " the dog": " the cat ."}[record["completion"]]
        (chosen,), cut = super().__call__(record, where)
        (rejected,), _ = super().__call__({**record, "completion": other}, where)
        return [(chosen, rejected)], cut


def pair_encoder(config, tokenizer, source):
    language = language_encoder(config, tokenizer, source)
    return PairEncoder(language.renderer, tokenizer, config.seq_len, prompt_weight=0.0)


PAIRS = RowFormat(name="pairs", encoder=pair_encoder, arrays=LANGUAGE.arrays, members=2)


def pairs(beta: float = 2.0) -> Objective:
    def margins(network, params, batch, chunk_tokens):
        """`[B]`: how much more likely the chosen answer is, in nats per token times `beta`."""
        nll, weights = language_row_sums(network, params, _fold(batch), chunk_tokens)
        mean_Bx2 = (nll / jnp.maximum(weights, 1)).reshape(-1, 2)
        return beta * (mean_Bx2[:, 1] - mean_Bx2[:, 0])

    def row_sums(network, params, batch, chunk_tokens=0):
        valid_B = batch["valid"].astype(jnp.float32)
        return -jax.nn.log_sigmoid(margins(network, params, batch, chunk_tokens)) * valid_B, valid_B

    def loss(network, params, batch, chunk_tokens=0):
        valid_B = batch["valid"].astype(jnp.float32)
        margins_B = margins(network, params, batch, chunk_tokens)
        weight = jnp.sum(valid_B)
        hits = jnp.sum((margins_B > 0) * valid_B)
        metrics = {"rewards/margins": (jnp.sum(margins_B * valid_B), weight), "rewards/accuracies": (hits, weight)}
        return Sums(-jnp.sum(jax.nn.log_sigmoid(margins_B) * valid_B), weight, metrics)

    def score_sums(network, params, batch, chunk_tokens):
        return loss(network, params, batch, chunk_tokens).metrics["rewards/accuracies"]

    return Objective(
        row_format=PAIRS,
        loss=loss,
        row_sums=row_sums,
        batch_info=_batch_info,
        score=Score(score_sums, lambda sums: {"accuracy": float(np.divide(*sums))}, {"accuracy": "max"}),
        check_model=check_decoder,
        vocabulary_logits=True,
    )


def _fold(batch):
    """The rows `[B, 2, T]` as `[2 B, T]`."""
    return {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items() if x.ndim == 3}


def _batch_info(batch):
    rows = _fold(batch)
    return BatchInfo(rows["segments"], jnp.sum(batch["valid"].astype(jnp.float32)), rows["prompt"])
