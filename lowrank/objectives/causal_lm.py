"""Language modeling: the weighted cross-entropy of the next token, scored by perplexity and by generated texts.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import data, models
from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, BatchInfo, Network, PyTree, Sums
from lowrank.kernels.cross_entropy import chunked_nll, chunked_token_nll, token_nll
from lowrank.metrics.text import perplexity, text_scores
from lowrank.objectives.objective import Objective, Score


def causal_lm() -> Objective:
    """Cross-entropy of the next token; a prompt's tokens weigh `data.prompt_loss_weight`, an answer's weigh 1."""
    return Objective(
        row_format=data.LANGUAGE,
        loss=language_loss,
        row_sums=language_row_sums,
        batch_info=_batch_info,
        score=Score(_answer_sums, _perplexity, {"nll": "min", "perplexity": "min"}),
        check_model=check_decoder,
        vocabulary_logits=True,
        score_texts=text_scores,
    )


def language_loss(network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> Sums:
    """Weighted cross-entropy of the next token, summed over the batch.

    `batch` has `tokens, targets, positions, segments, weights` `[B,T]`. With `chunk_tokens > 0` the head runs over
    chunks of about this many tokens at a time and the `[B,T,V]` logits are never stored; 0 runs it once.
    """
    h_BxTxD, head = _features(network, params, batch)
    if chunk_tokens:
        total = chunked_nll(head, *_shards_as_rows(h_BxTxD, batch), chunk_tokens)
    else:
        total = jnp.sum(token_nll(head(h_BxTxD), batch["targets"]) * batch["weights"])
    return Sums(total, jnp.sum(batch["weights"]))


def language_row_sums(
    network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0
) -> tuple[jax.Array, jax.Array]:
    """`(weighted cross-entropy, weights)` `[B]`: the sums of `language_loss` for each row."""
    nll_BxT = language_token_nll(network, params, batch, chunk_tokens)
    return jnp.sum(nll_BxT, axis=-1), jnp.sum(batch["weights"], axis=-1)


def language_token_nll(
    network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0, temperature: float = 1.0
) -> jax.Array:
    """`[B, T]`: the terms of `language_loss`, of the logits divided by `temperature`."""
    h_BxTxD, head = _features(network, params, batch)
    scaled = head if temperature == 1 else lambda h: head(h) / temperature
    if not chunk_tokens:
        return token_nll(scaled(h_BxTxD), batch["targets"]) * batch["weights"]
    nll_CBxT = chunked_token_nll(scaled, *_shards_as_rows(h_BxTxD, batch), chunk_tokens)
    B, T = batch["targets"].shape
    return jnp.moveaxis(nll_CBxT.reshape(-1, B, nll_CBxT.shape[1]), 0, 1).reshape(B, T)


def check_decoder(name: str, config: Any) -> None:
    """Raises UserError for a model that predicts no next token."""
    if not isinstance(config, models.DecoderConfig):
        raise UserError(
            f"{name} is an encoder, which predicts no next token: set objective=classification, or name a decoder"
        )


def _features(network: Network, params: PyTree, batch: Batch) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """`(hidden states [B,T,D], the head that makes them logits [..., V])`."""
    variables = {"params": params}
    h_BxTxD = network.apply(variables, batch["tokens"], batch["positions"], batch["segments"], method="features")
    return h_BxTxD, functools.partial(network.apply, variables, method="logits")


def _shards_as_rows(h_BxTxD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The hidden states, targets and weights, in which each shard of a row over `context` is a row of its own."""
    rows = sharding.context_as_rows
    return rows(h_BxTxD), rows(batch["targets"]), rows(batch["weights"])


def _batch_info(batch: Batch) -> BatchInfo:
    return BatchInfo(batch["segments"], jnp.sum(batch["weights"].astype(jnp.float32)), batch["prompt"])


def _answer_sums(network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> tuple[jax.Array, jax.Array]:
    """`(summed nll, tokens)` of the targets that weigh 1: the answers where prompts weigh less, else every token."""
    whole_BxT = (batch["weights"] == 1).astype(jnp.float32)
    sums = language_loss(network, params, {**batch, "weights": whole_BxT}, chunk_tokens)
    return sums.total, sums.weight


def _perplexity(sums: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """`perplexity`, `nll` (nats per token) and `tokens`."""
    nll, tokens = sums
    return {"perplexity": perplexity(float(nll), float(tokens)), "nll": float(nll / tokens), "tokens": float(tokens)}
