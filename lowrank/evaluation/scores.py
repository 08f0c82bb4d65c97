"""Scores of a model on held-out data: perplexity, classification, and texts against their references.

Batches are those of `lowrank.data`: all of one shape, so that each function compiles once, the rows that only fill up
the last one marked by `valid` 0. Sums are taken inside the program, over the rows of all hosts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lowrank.core import sharding
from lowrank.core.typing import Batch, Bind, PyTree, Sums
from lowrank.metrics import scores
from lowrank.objectives import losses

Put = Callable[[Batch], Mapping[str, jax.Array]]  # how this host's rows get onto the devices


def perplexity(
    model: nn.Module,
    params: PyTree,
    batches: Iterable[Batch],
    *,
    bind: Bind | None = None,
    put: Put = dict,
    rows: int = 1024,
) -> dict[str, float]:
    """`perplexity`, `nll` (nats a token) and `tokens` over language-modelling batches.

    Only targets of full weight (1) count: with a prompt loss weight below 1 these are the answers, their end tokens
    included; else every token. `rows` tokens at a time have their logits in memory; 0: all of a batch's. Raises
    UserError without tokens.
    """
    with sharding.mesh_context(params):
        sums = [_token_sums(model, bind, rows, params, put(batch)) for batch in batches]
    nll, tokens = np.sum(np.asarray(sums, np.float64).reshape(-1, 2), axis=0)
    return {"perplexity": scores.perplexity(nll, tokens), "nll": float(nll / tokens), "tokens": float(tokens)}


def classification(
    model: nn.Module, params: PyTree, batches: Iterable[Batch], *, bind: Bind | None = None, put: Put = dict
) -> dict[str, float]:
    """`accuracy`, `macro_f1` (see `metrics.macro_f1`) and `examples` over classification batches."""
    classes = model.config.num_labels
    counts_CxC = np.zeros((classes, classes), np.int64)
    with sharding.mesh_context(params):
        for batch in batches:
            counts_CxC += np.asarray(_confusion(model, bind, params, put(batch)))
    return {
        "accuracy": scores.accuracy(counts_CxC),
        "macro_f1": scores.macro_f1(counts_CxC),
        "examples": float(counts_CxC.sum()),
    }


def texts(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL`, `exact_match` in [0, 1], `bleu` in [0, 100], and `examples`; see `metrics`."""
    return {
        **scores.rouge(predictions, references),
        "bleu": scores.bleu(predictions, references),
        "exact_match": scores.exact_match(predictions, references),
        "examples": float(len(references)),
    }


@partial(jax.jit, static_argnames=("model", "bind", "rows"))
def _token_sums(model: nn.Module, bind: Bind | None, rows: int, params: PyTree, batch: Batch) -> Sums:
    """`(summed nll, tokens)` of the targets that weigh 1."""
    params = bind(params, batch, None) if bind else params
    whole_BxT = (batch["weights"] == 1).astype(jnp.float32)
    return losses.causal_lm(model, params, {**batch, "weights": whole_BxT}, rows)


@partial(jax.jit, static_argnames=("model", "bind"))
def _confusion(model: nn.Module, bind: Bind | None, params: PyTree, batch: Batch) -> jax.Array:
    """Counts `[C, C]` of (label, prediction) over the valid rows."""
    params = bind(params, batch, None) if bind else params
    logits_BxC = model.apply({"params": params}, batch["tokens"], segments=batch["segments"])
    C = logits_BxC.shape[-1]
    hits_BxC = jax.nn.one_hot(batch["labels"], C, dtype=jnp.int32) * batch["valid"][:, None]
    return hits_BxC.T @ jax.nn.one_hot(jnp.argmax(logits_BxC, axis=-1), C, dtype=jnp.int32)
