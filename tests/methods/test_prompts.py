"""Prompts and prefixes as methods: what they are made of, what an adapter holds of them, what does not fit."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank import methods
from lowrank.adapters import nearest_tokens
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.evaluation import evaluate
from lowrank.models import build_model
from lowrank.objectives import causal_lm
from lowrank.training import build as plan
from lowrank.training import loop
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of, train_shortly


def test_the_mlp_of_a_prefix_is_the_papers():
    L, P, W, H = 3, 2, 4, 5
    method = methods.build_method({"name": "prefix", "length": P, "reparam": True, "hidden": H})
    params = {"prefix": {n: np.zeros((L, P, W), np.float32) for n in "kv"}}
    params = methods.attach(method, params, jax.random.key(0))
    params = tree.map_named(lambda n, x: x + 0.1 if n.endswith("bias") else x, params)
    s = jax.tree.map(lambda x: np.asarray(x, np.float64), params["shared"]["prefix"])
    rows = np.tanh(s["embedding"] @ s["in"]["kernel"] + s["in"]["bias"]) @ s["out"]["kernel"] + s["out"]["bias"]
    made = method.bind(params, None, None)["prefix"]
    for layer in range(L):
        for i, name in enumerate("kv"):
            at = (2 * layer + i) * W
            assert_close(made[name][layer], rows[:, at : at + W])


def test_an_adapter_holds_what_the_mlp_makes_and_not_the_mlp(files, tmp_path, monkeypatch):
    seen = []
    exported = methods.exported_leaves
    monkeypatch.setattr(methods, "exported_leaves", lambda *args: seen.append(exported(*args)) or seen[-1])
    _, loaded = train_shortly(files, "method=mam,length=4,width=4,reparam=True,hidden=16", tmp_path)
    names = set(load_file(tmp_path / "adapter" / "trained.safetensors"))
    adapters = {f"layers/mlp_adapter/{n}/{f}" for n in ("down", "up") for f in ("kernel", "bias")}
    assert names == {"prefix/k", "prefix/v", *adapters}
    assert loaded.config.adapter_scale == 4
    assert loaded.config.prefix_length == 4
    [(params, _)] = seen
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    # A run's `bind` leaves them as they are, so that a finished run can be scored.
    method = methods.build_method({"name": "mam", "length": 4, "width": 4, "reparam": True})
    assert method.bind(loaded.params, None, None) is loaded.params
    batch = {n: np.ones((1, 4), np.int32) for n in ("tokens", "targets", "positions", "segments", "prompt")}
    scores = evaluate(
        causal_lm(),
        build_model(loaded.config),
        loaded.params,
        [{**batch, "weights": np.ones((1, 4), np.float32)}],
        bind=method.bind,
    )
    assert scores["tokens"] == 4


@pytest.mark.parametrize(
    ("arg", "culprit"),
    [
        ("method=prompt,length=64", "1 token and 64 virtual tokens is longer than the model's 64 positions"),
        ("method=prefix,length=70", "1 token and 70 virtual tokens is longer than the model's 64 positions"),
        ("method=prefix,length=40", "data.seq_len=32 and 40 virtual tokens exceed the model's 64 positions"),
        ("method=mam,lenght=4", "method.length"),
        ("method=prompt,init=txt", "unknown prompt init 'txt' (did you mean 'text'?)"),
        ("method=prompt,init=text", "give both or neither"),
        ("method=ptuning,encoder=gru", "unknown P-tuning encoder 'gru'; known: lstm, mlp"),
        ("method=ptuning,hidden=0", "method.hidden must be positive"),
    ],
)
def test_what_does_not_fit_the_positions_is_refused(arg, culprit, files, tmp_path):
    with pytest.raises(UserError) as error:
        loop.run(config_of(files, arg), tmp_path / "w")
    assert culprit in str(error.value)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, cell):
    """Hochreiter & Schmidhuber's cell with a forget gate, over the rows of `x`."""
    h = c = np.zeros(cell["hi"]["bias"].shape)
    out = []
    for row in x:
        i, f, g, o = (
            row @ cell[f"i{n}"]["kernel"] + h @ cell[f"h{n}"]["kernel"] + cell[f"h{n}"]["bias"] for n in "ifgo"
        )
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_encoders_of_p_tuning_are_the_papers(encoder):
    method = methods.build_method({"name": "ptuning", "length": 3, "encoder": encoder, "hidden": 4})
    params = methods.attach(method, {"prompt": {"embedding": np.zeros((3, 6), np.float32)}}, jax.random.key(0))
    params = tree.map_named(lambda n, x: x + 0.3 if n.endswith("bias") else x, params)
    s = jax.tree.map(lambda x: np.asarray(x, np.float64), params["shared"]["prompt"])
    dense = lambda x, n: x @ s[n]["kernel"] + s[n]["bias"]  # noqa: E731
    x = s["embedding"]
    for i in range(2) if encoder == "lstm" else ():
        x = np.concatenate([lstm(x, s[f"forward{i}"]), lstm(x[::-1], s[f"backward{i}"])[::-1]], axis=1)
    for name in ("in", "mid") if encoder == "mlp" else ("in",):
        x = np.maximum(dense(x, name), 0)
    assert_close(method.bind(params, None, None)["prompt"]["embedding"], dense(x, "out"))


def test_a_prompt_starts_from_the_vocabulary_or_from_a_text(files):
    starts = {}
    for arg in (
        "length=5,init=vocabulary",
        "length=5,init=text,text=the red cat",
        "length=2,init=text,text=the red cat",
    ):
        run = plan.build_run(config_of(files, f"method=prompt,{arg}", mesh__data=1))
        params, _ = run.attach(run.load().params)
        starts[arg] = run.calibrate(params)["prompt"]["embedding"]
    table, ids = np.asarray(params["embed"]["embedding"]), run.tokenizer.encode("the red cat the red")
    drawn, text, short = starts.values()
    assert all(np.any(np.all(table == row, axis=1)) for row in np.asarray(drawn))
    np.testing.assert_array_equal(text, table[ids])
    np.testing.assert_array_equal(short, table[ids[:2]])


def test_the_prompt_command_prints_the_nearest_tokens(files, tmp_path):
    train_shortly(files, "method=ptuning,length=2,encoder=mlp,hidden=8", tmp_path)
    command = [sys.executable, "-m", "launch.prompt", f"--workdir={tmp_path}", "--top=2"]  # in a process of its own,
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # for commands share names of flags
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert len(re.findall(r"'\S+' -?\d\.\d\d", lines[1])) == 2


def test_the_nearest_tokens_are_those_of_the_largest_cosine():
    rng = np.random.default_rng(0)
    table, prompt = rng.normal(size=(11, 4)), rng.normal(size=(3, 4))
    cosines = (prompt / np.linalg.norm(prompt, axis=1)[:, None]) @ (table / np.linalg.norm(table, axis=1)[:, None]).T
    params = {"embed": {"embedding": jnp.asarray(table)}, "prompt": {"embedding": jnp.asarray(prompt)}}
    ids, found = nearest_tokens.nearest(params, 2)
    np.testing.assert_array_equal(ids, np.argsort(-cosines, axis=1)[:, :2])
    assert_close(found, -np.sort(-cosines, axis=1)[:, :2])
    with pytest.raises(UserError, match="no learned prompt"):
        nearest_tokens.nearest({}, 1)
    with pytest.raises(UserError, match="there are 1 to 11"):
        nearest_tokens.nearest(params, 12)
