"""The scores of gaps that are filled in, and of documents: held to float64 over whole sequences, without batches."""

import functools
import json

import jax
import numpy as np
import pytest

from lowrank import data, pretrained
from lowrank.core.errors import UserError
from lowrank.data.gaps import find_gaps
from lowrank.evaluation import document_scores, evaluate, infill_scores, infilling
from lowrank.models import build_model
from lowrank.objectives import causal_lm
from tests.support.close import assert_close

RULE = {"sentinels": ("saw", "ate", "ran"), "cuts": "tokens", "longest": 16}


@pytest.fixture(scope="module")
def model(files):
    return pretrained.load(str(files / "llama"))


@pytest.fixture(scope="module")
def texts(files):
    records = map(json.loads, (files / "records.jsonl").read_text().splitlines())
    return [record["text"] for record in records][:9]


def nll(model, before, middle):
    """The summed negative log-likelihood of a middle in float64, from the logits of the whole sequence."""
    ids = np.array([*before, *middle])
    logits = np.asarray(_logits(model.config, model.params, np.pad(ids, (0, 40 - len(ids)))[None])[0], np.float64)
    logp = (logits - np.log(np.sum(np.exp(logits), -1, keepdims=True)))[: len(ids) - 1]
    return -np.sum(np.take_along_axis(logp, ids[1:, None], -1)[-len(middle) :])


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, ids):
    return build_model(config).apply({"params": params}, ids)


def test_the_scores_are_those_of_the_middles(model, texts, monkeypatch):
    gaps = find_gaps(model.tokenizer, texts, length=24, **RULE)
    wanted = [gap.text for gap in gaps]
    written = [f" {wanted[0]}\n", "", *wanted[2:]]
    monkeypatch.setattr(infilling.generate, "texts", lambda *_, **options: written)
    scores = infill_scores(model, texts, length=24, batch_size=4, **RULE)
    assert_close(scores["exact_match"], (len(texts) - 1) / len(texts))
    part = len(wanted[0]) / (len(wanted[0]) + 2)
    assert_close(scores["edit_similarity"], (part + len(texts) - 2) / len(texts), relative=1e-12)
    tokens = sum(len(gap.middle) for gap in gaps)
    for name, before in (("perplexity", "asked"), ("left_to_right_perplexity", "prefix")):
        total = sum(nll(model, getattr(gap, before), gap.middle) for gap in gaps)
        assert_close(scores[name], np.exp(total / tokens))
    assert scores["documents"] == len(texts) == len(gaps)


def test_documents_are_scored_as_the_loader_reads_them(model, texts, tmp_path):
    long = [" ".join(texts[:3]), *texts[3:]]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    once = {"epochs": 1, "shuffle": False, "template": "text", "seq_len": 24, "batch_size": 4}
    loader = data.make_loader(data.DataConfig(source=f"jsonl:{tmp_path / 'long.jsonl'}", **once), model.tokenizer)
    expected = evaluate(causal_lm(), build_model(model.config), model.params, loader)
    found = document_scores(model, long, length=24, batch_size=4)
    assert found["tokens"] == expected["tokens"] == sum(len(model.tokenizer.encode(text)) for text in long)
    assert_close(found["nll"], expected["nll"])
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_an_option_out_of_range_is_refused(files):
    with pytest.raises(UserError, match=r"eval\.infill\.documents=0 is below 1"):
        infilling.InfillingConfig(documents=0)
    assert infilling.build_infilling(None, data.DataConfig(), data.DataConfig(), None) is None
