import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.evaluation import evaluate
from lowrank.evaluation.evaluate import _sums
from lowrank.metrics.classification import accuracy, confusion, macro_f1
from lowrank.metrics.text import bleu, rouge, text_scores
from lowrank.models import DecoderConfig, build_model
from lowrank.objectives import causal_lm, classification
from tests.support.close import assert_close

V, C, B, T = 31, 3, 4, 8
SIZES = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 24}


@functools.cache
def _model(**options):
    model = build_model(DecoderConfig(vocab_size=V, max_positions=T, **SIZES, **options))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, T), jnp.int32))["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), params)


def _rows(n):
    """`n` rows with 3 to T tokens, the rest padding; the first two targets weigh 0.1, the others 1."""
    rng = np.random.default_rng(n)
    real = np.arange(T) < rng.integers(3, T + 1, n)[:, None]
    rows = {name: rng.integers(1, V, (n, T)).astype(np.int32) for name in ("tokens", "targets")}
    rows["segments"] = real.astype(np.int32)
    rows["positions"] = np.where(real, np.arange(T), 0).astype(np.int32)
    rows["weights"] = (real * np.where(np.arange(T) < 2, 0.1, 1.0)).astype(np.float32)
    rows["prompt"] = real & (np.arange(T) < 3)
    return rows | {"labels": rng.integers(0, C, n).astype(np.int32)}


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, rows):
    return model.apply({"params": params}, rows["tokens"], segments=rows["segments"])


def _batches(rows):
    """Batches of B as `lowrank.data` makes them: the last one is filled up with copies that count for nothing."""
    n = len(rows["tokens"])
    for start in range(0, n, B):
        index = np.arange(start, start + B)
        batch = {name: x[np.minimum(index, n - 1)] for name, x in rows.items()} | {
            "valid": (index < n).astype(np.int32)
        }
        batch["weights"] = batch["weights"] * batch["valid"][:, None]
        yield batch | {"labels": np.where(batch["valid"], batch["labels"], -1)}


def test_perplexity_equals_float64_over_the_answers_and_compiles_once():
    model, params = _model()
    rows = _rows(10)
    before = _sums._cache_size()
    scores = evaluate(causal_lm(), model, params, _batches(rows))
    assert _sums._cache_size() == before + 1
    logits = np.asarray(_logits(model, params, rows), np.float64)
    logp = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    nll = -np.take_along_axis(logp, rows["targets"][..., None], -1)[..., 0][rows["weights"] == 1]
    assert scores["tokens"] == nll.size
    assert_close(scores["nll"], nll.mean())
    assert_close(scores["perplexity"], np.exp(nll.mean()))


def test_every_token_counts_where_the_prompt_weighs_1():
    model, params = _model()
    rows = _rows(6)
    rows["weights"] = (rows["weights"] > 0).astype(np.float32)
    scores = evaluate(causal_lm(), model, params, _batches(rows))
    assert scores["tokens"] == rows["segments"].sum()


def test_perplexity_without_tokens_is_an_error():
    model, params = _model()
    with pytest.raises(UserError, match="evaluation set is empty"):
        evaluate(causal_lm(), model, params, [])


def test_classification_equals_row_by_row_on_any_mesh():
    model, params = _model(num_labels=C)
    rows = _rows(10)
    logits = _logits(model, params, rows)
    counts = confusion(rows["labels"], np.argmax(logits, -1), C)
    assert len(set(np.argmax(logits, -1).tolist())) > 1
    want = {"accuracy": accuracy(counts), "macro_f1": macro_f1(counts), "examples": 10.0}
    assert evaluate(classification(), model, params, _batches(rows)) == want
    put = functools.partial(sharding.make_global_batch, mesh=sharding.make_mesh(4, 1, 1))
    assert evaluate(classification(), model, params, _batches(rows), put=put) == want


def test_a_methods_bind_is_applied_inside():
    model, params = _model()

    def blank(params, batch, rng):
        assert rng is None
        assert batch.segments.shape == (B, T)
        return jax.tree.map(jnp.zeros_like, params)

    scores = evaluate(causal_lm(), model, params, _batches(_rows(6)), bind=blank)
    assert_close(scores["perplexity"], V)


def test_texts_gathers_every_text_metric():
    scores = text_scores(["Ad sales up", "no"], ["ad sales up", "yes"])
    assert scores == {
        **rouge(["Ad sales up", "no"], ["ad sales up", "yes"]),
        "bleu": bleu(["Ad sales up", "no"], ["ad sales up", "yes"]),
        "exact_match": 0.5,
        "examples": 2.0,
    }
    assert scores["rougeL"] == 0.5
