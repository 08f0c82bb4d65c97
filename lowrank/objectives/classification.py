"""Classification of texts: the cross-entropy of labels, scored by accuracy and F1.

Shapes: B rows, T tokens, D width, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank import data
from lowrank.core.typing import Batch, BatchInfo, Network, PyTree, Sums
from lowrank.kernels.cross_entropy import token_nll
from lowrank.metrics.classification import accuracy, macro_f1
from lowrank.objectives.objective import Objective, Score

Logits = Callable[[Network, PyTree, Batch], jax.Array]


def classification() -> Objective:
    """Cross-entropy of `labels` under the logits of a new head, which is trained with every method."""
    return _objective(_logits, _batch_info, on_features=_objective(_logits_of_features, _batch_info_of_features))


def _objective(
    logits: Logits, batch_info: Callable[[Batch], BatchInfo], on_features: Objective | None = None
) -> Objective:
    def row_sums(network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> tuple[jax.Array, jax.Array]:
        del chunk_tokens  # the logits are few
        weights_B = batch["valid"].astype(jnp.float32)
        return token_nll(logits(network, params, batch), batch["labels"]) * weights_B, weights_B

    def loss(network: Network, params: PyTree, batch: Batch, chunk_tokens: int = 0) -> Sums:
        total_B, weights_B = row_sums(network, params, batch, chunk_tokens)
        return Sums(jnp.sum(total_B), jnp.sum(weights_B))

    return Objective(
        row_format=data.LABELED,
        loss=loss,
        row_sums=row_sums,
        batch_info=batch_info,
        score=Score(_confusion, _class_scores, {"accuracy": "max", "macro_f1": "max"}),
        check_model=_check_model,
        vocabulary_logits=False,
        model_options=_model_options,
        trainable=("head/.*",),
        on_features=on_features,
    )


def _logits(network: Network, params: PyTree, batch: Batch) -> jax.Array:
    """`[B, C]` of `tokens` and `segments` `[B, T]`."""
    return network.apply({"params": params}, batch["tokens"], segments=batch["segments"])


def _logits_of_features(network: Network, params: PyTree, batch: Batch) -> jax.Array:
    """`[B, C]` of `pooled` `[B, D]`, the features that the head reads."""
    return network.apply({"params": params}, batch["pooled"], method="label_logits")


def _batch_info(batch: Batch) -> BatchInfo:
    return BatchInfo(batch["segments"], jnp.sum(batch["valid"].astype(jnp.float32)))


def _batch_info_of_features(batch: Batch) -> BatchInfo:
    """The features of a row stand for a single token: the segments are `[B, 1]`."""
    return BatchInfo(batch["valid"][:, None], jnp.sum(batch["valid"].astype(jnp.float32)))


def _check_model(name: str, config: Any) -> None:
    """Every model can be given a new head."""


def _model_options(labels: Sequence[str]) -> dict[str, Any]:
    return {"num_labels": len(labels)}


def _confusion(network: Network, params: PyTree, batch: Batch, chunk_tokens: int) -> jax.Array:
    """Counts `[C, C]` of (label, prediction) over the valid rows."""
    del chunk_tokens
    logits_BxC = _logits(network, params, batch)
    C = logits_BxC.shape[-1]
    hits_BxC = jax.nn.one_hot(batch["labels"], C, dtype=jnp.int32) * batch["valid"][:, None]
    return hits_BxC.T @ jax.nn.one_hot(jnp.argmax(logits_BxC, axis=-1), C, dtype=jnp.int32)


def _class_scores(counts_CxC: np.ndarray) -> dict[str, float]:
    """`accuracy`, `macro_f1` and `examples`."""
    return {
        "accuracy": accuracy(counts_CxC),
        "macro_f1": macro_f1(counts_CxC),
        "examples": float(counts_CxC.sum()),
    }
