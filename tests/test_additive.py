"""Prompts and prefixes as methods: what they are made of, what an adapter holds of them, what does not fit."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank import evaluate, merging, methods, train, tree
from lowrank.errors import UserError
from lowrank.models import build
from tests import tiny
from tests.test_train import config_of

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.records(folder / "records.jsonl")
    return folder


def trained(files, arg, folder, **changes):
    """`(summary, the model as its adapter gives it back)` of a short run."""
    config = config_of(files, arg, optim__lr=0.05, mesh__data=1, checkpoint__every=0, steps=3, **changes)
    return train.run(config, folder), merging.adapted(folder / "adapter", str(files / "llama"))


def test_the_mlp_of_a_prefix_is_the_papers():
    L, P, W, H = 3, 2, 4, 5
    method = methods.build({"name": "prefix", "length": P, "reparam": True, "hidden": H})
    params = {"prefix": {n: np.zeros((L, P, W), np.float32) for n in "kv"}}
    params = methods.attach(method, params, jax.random.key(0))
    params = tree.map_named(lambda n, x: x + 0.1 if n.endswith("bias") else x, params)
    s = jax.tree.map(lambda x: np.asarray(x, np.float64), params["shared"]["prefix"])
    rows = np.tanh(s["embedding"] @ s["in"]["kernel"] + s["in"]["bias"]) @ s["out"]["kernel"] + s["out"]["bias"]
    made = method.bind(params, None, None)["prefix"]
    for layer in range(L):
        for i, name in enumerate("kv"):
            at = (2 * layer + i) * W
            np.testing.assert_allclose(made[name][layer], rows[:, at : at + W], rtol=1e-5, atol=1e-5)


def test_an_adapter_holds_what_the_mlp_makes_and_not_the_mlp(files, tmp_path, monkeypatch):
    seen = []
    finished = methods.finished
    monkeypatch.setattr(methods, "finished", lambda *args: seen.append(finished(*args)) or seen[-1])
    _, loaded = trained(files, "method=mam,length=4,width=4,reparam=True,hidden=16", tmp_path)
    names = set(load_file(tmp_path / "adapter" / "trained.safetensors"))
    adapters = {f"layers/mlp_adapter/{n}/{f}" for n in ("down", "up") for f in ("kernel", "bias")}
    assert names == {"prefix/k", "prefix/v", *adapters}
    assert loaded.config.adapter_scale == 4
    assert loaded.config.prefix_length == 4
    [(params, _)] = seen
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    # A run's `bind` leaves them as they are, so that a finished run can be scored.
    method = methods.build({"name": "mam", "length": 4, "width": 4, "reparam": True})
    assert method.bind(loaded.params, None, None) is loaded.params
    batch = {n: np.ones((1, 4), np.int32) for n in ("tokens", "targets", "positions", "segments")}
    scores = evaluate.perplexity(
        build(loaded.config), loaded.params, [{**batch, "weights": np.ones((1, 4), np.float32)}], bind=method.bind
    )
    assert scores["tokens"] == 4


@pytest.mark.parametrize(
    ("arg", "culprit"),
    [
        ("method=prompt,length=64", "1 tokens and 64 virtual ones exceeds the model's 64 positions"),
        ("method=prefix,length=70", "1 tokens and 70 virtual ones exceeds the model's 64 positions"),
        ("method=prefix,length=40", "data.seq_len=32 exceeds the model's 24 positions"),
        ("method=mam,lenght=4", "method.length"),
    ],
)
def test_what_does_not_fit_the_positions_is_refused(arg, culprit, files, tmp_path):
    with pytest.raises(UserError) as error:
        train.run(config_of(files, arg), tmp_path / "w")
    assert culprit in str(error.value)
