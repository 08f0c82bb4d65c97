"""Runs that learn from rewards of texts that they write: they learn, resume bit for bit, and refuse bad input."""

import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.data import DataConfig, make_loader, prompt_rows
from lowrank.pretrained import describe
from lowrank.training import build, loop, step
from lowrank.training.texts import Texts
from tests.support.close import assert_close
from tests.support.resumed_runs import numbers, whole_and_resumed
from tests.support.thinning import keep
from tests.support.tiny_runs import config_of

DOGS = "rewards_of_runs.dogs"


@pytest.fixture(autouse=True)
def dogs(monkeypatch):
    """A module with the share of a text's words that are dogs, and with a function that fails at its third call."""
    module, calls = types.ModuleType("rewards_of_runs"), []
    module.dogs = lambda completions: [text.split().count("dog") / max(1, len(text.split())) for text in completions]

    def tired(completions):
        calls.append(completions)
        if len(calls) == 3:
            raise RuntimeError("out of service")
        return module.dogs(completions)

    module.tired = tired
    monkeypatch.setitem(sys.modules, module.__name__, module)


def config(files, arg="method=full", changes=None, **objective):
    fixed = {"mesh__data": 1, "checkpoint__every": 0, "data__batch_size": 8, "steps": 4, **(changes or {})}
    made = config_of(files, arg, **fixed)
    with made.ignore_type():
        made.objective = {"name": "grpo", "reward_funcs": (DOGS,), "group_size": 4, "max_new": 8, **objective}
    return made


def first_batch(made):
    """`(run, state, frozen leaves, the texts of its first step)`."""
    run = build.build_run(made)
    state, frozen, _ = run.start(run.load().params, run.optimizer())
    params = tree.join(state.trained, frozen)
    return run, state, frozen, Texts(run).write(next(run.loader), lambda: params, 0)


@pytest.mark.all  # the contract of objectives steps too
def test_rewards_rise_and_held_out_texts_have_them(files, tmp_path):
    changes = {"steps": 8, "optim__lr": 0.05, "data__batch_size": 16, "eval": {"split": "train", "max_examples": 8}}
    summary = loop.run(config(files, changes=changes, beta=0.01), tmp_path)
    lines = [line for line in numbers(tmp_path) if "train/reward" in line]
    assert lines[-1]["train/reward"] > lines[0]["train/reward"] + 0.2
    assert summary["after"]["reward"] > summary["before"]["reward"] + 0.2
    assert summary["after"]["texts"] == 8
    assert lines[0]["train/kl"] == 0 < lines[-1]["train/kl"]
    assert 0 < lines[0]["train/completions/mean_length"] <= 8
    assert json.loads((tmp_path / "summary.json").read_text())["after"] == summary["after"]


METHODS = {
    "lora": "rank=2",
    "pissa": "init=pissa,rank=2",
    "prompt": "method=prompt,length=4",
    "bitfit": "method=bitfit",
}
METHODS |= {"intrinsic": "method=intrinsic,dim=16"}


@pytest.mark.parametrize("method", keep(METHODS, ["lora"]))
def test_a_run_that_stops_between_two_updates_of_its_texts_resumes_bit_for_bit(method, files, tmp_path, monkeypatch):
    changes = {"steps": 3, "optim__lr": 0.05, "mesh__fsdp": 1 if method == "lora" else 2}
    made = config(files, METHODS[method], changes, reward_funcs="grounded", beta=0.1, updates=2, loss="grpo")
    whole, resumed = whole_and_resumed(made, tmp_path, monkeypatch, stop=1)
    assert resumed == whole
    first, second, third = (line["train/reward"] for line in whole)
    assert first == second != third


@pytest.mark.parametrize("loss", keep(["dapo", "dr_grpo", "grpo", "rloo"], []))
def test_microbatches_and_a_mesh_change_nothing(loss, files):
    found, written = [], None
    for accumulate, mesh in ((1, {"data": 1}), (2, {"data": 1}), (2, {"data": 2, "fsdp": 2, "context": 2})):
        changes = {"optim__accumulate": accumulate, "optim__name": "sgd", "optim__clip": 0.0, "mesh": mesh}
        run, state, frozen, texts = first_batch(config(files, changes=changes, loss=loss, beta=0.1))
        written = written or texts
        batch = run.put(written)
        program = step.compile_step(run.step(run.optimizer()), state, frozen, batch)
        state, metrics = program(state, frozen, batch, np.float32(0.1))
        found.append(jax.device_get((metrics, state.trained)))
    for other in found[1:]:
        assert_close(other[0]["grad_norm"], found[0][0]["grad_norm"], relative=1e-4)
        assert_close(other[1], found[0][1], relative=1e-4)


@pytest.mark.all
def test_a_row_holds_a_prompt_and_its_text_and_the_group_stays_together(files):
    _, _, _, batch = first_batch(config(files))
    assert (batch["record"].reshape(2, 4) == batch["record"].reshape(2, 4)[:, :1]).all()
    for i in range(8):
        learned = np.flatnonzero(batch["weights"][i])
        size = batch["segments"][i].sum()
        assert (batch["tokens"][i, 1:size] == batch["targets"][i, : size - 1]).all()
        assert learned.tolist() == list(range(batch["prompt"][i].sum() - 1, size))
        assert len(learned) == batch["completions/mean_length"][i]
    assert len({row.tobytes() for row in batch["tokens"]}) > 2  # the texts of a prompt differ


@pytest.mark.all
def test_a_reward_function_that_fails_later_loses_no_step(files, tmp_path):
    with pytest.raises(UserError, match=r"records.jsonl:\d+: the reward function 'tired' raises RuntimeError: out of"):
        loop.run(config(files, reward_funcs=("rewards_of_runs.tired",)), tmp_path / "stopped")
    loop.run(config(files, reward_funcs=("rewards_of_runs.tired",)), tmp_path / "stopped")
    loop.run(config(files), tmp_path / "whole")
    same = lambda folder: [line["train/reward"] for line in numbers(tmp_path / folder)]  # noqa: E731
    assert same("stopped") == same("whole")


@pytest.mark.parametrize(
    ("changes", "objective", "text"),
    [
        ({"data__batch_size": 6}, {}, "data.batch_size=6 counts texts, and is not divisible by the 4 of each prompt"),
        ({}, {"max_new": 32}, "data.seq_len=32 holds a prompt and its text of up to 32 tokens"),
        ({}, {"max_new": 30}, r"records.jsonl:1: \d+ tokens without the text that may be cut; at most 2 fit"),
        ({"data__template": "text"}, {}, "data.template=text has no prompt for the model to continue"),
        ({"data__template": "{question}"}, {}, "template field 'question' is not in"),
        ({"model__name": "bert"}, {}, "is an encoder, which predicts no next token"),
    ],
)
def test_bad_input_is_refused_before_a_weight_is_read(changes, objective, text, files, monkeypatch):
    changes = {**changes, **({"model__name": str(files / "bert")} if "model__name" in changes else {})}
    changes |= {"data__template": "the {label} {prompt} who"} if objective.get("max_new") == 30 else {}
    changes |= {"data__truncate": "label"} if objective.get("max_new") == 30 else {}
    monkeypatch.setattr(build.Run, "load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=text):
        build.build_run(config(files, changes=changes, **objective))


@pytest.mark.all
def test_a_method_that_starts_from_gradients_of_data_is_refused(files):
    run = build.build_run(config(files, "method=sparse,choose=fisher,density=0.1"))
    with pytest.raises(UserError, match="starts from gradients of the first batches, which hold prompts without texts"):
        run.start(run.load().params, run.optimizer())


PROMPTS = {  # records -> the first prompt, and whether an evaluation has a reference
    '{"prompt": "the cat sat"}': ("the cat sat", ""),
    '{"prompt": "the cat sat", "completion": " on"}': ("the cat sat", "on"),
}


@pytest.mark.parametrize("record", PROMPTS)
def test_a_prompt_needs_no_answer(record, files, tmp_path):
    (tmp_path / "r.jsonl").write_text(record + "\n")
    tokenizer = describe(str(files / "llama"), {})[1]
    rows = prompt_rows("grpo", 2, 4, {})
    settings = DataConfig(source=f"jsonl:{tmp_path / 'r.jsonl'}", seq_len=8, batch_size=2, prefetch=0)
    loader = make_loader(settings, tokenizer, row_format=rows)
    batch, (text, answer) = next(loader), PROMPTS[record]
    assert tokenizer.decode(batch["tokens"][0][batch["segments"][0] == 1].tolist()) == text
    assert loader.record(0) == (json.loads(record), f"{tmp_path / 'r.jsonl'}:1")
    example = rows.encoder(settings, tokenizer, loader._examples.source).example(json.loads(record), "here", 2)
    assert (example["prompt"], example["completion"]) == (text, answer)


def test_an_empty_prompt_is_refused_with_its_record(files, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": " "}\n')
    changes = {"data__source": f"jsonl:{tmp_path / 'r.jsonl'}"}
    with pytest.raises(UserError, match=r"r.jsonl:2: the prompt is empty"):
        build.build_run(config(files, changes=changes))


TWO_HOSTS = """
from tests.support.tiny_runs import config_of


def get_config(arg=None):
    config = config_of(pathlib.Path(arg), "rank=2", steps=3, optim__lr=0.05, mesh__data=2, mesh__fsdp=2)
    with config.ignore_type():
        config.objective = {"name": "grpo", "reward_funcs": ("grounded",), "group_size": 4, "max_new": 8, "updates": 2}
    return config
"""


@pytest.mark.all
def test_two_processes_write_the_texts_of_one(files, tmp_path):
    (tmp_path / "two.py").write_text(f"import pathlib\n{TWO_HOSTS}")
    words = [f"--config={tmp_path / 'two.py'}:{files}", f"--workdir={tmp_path / 'two'}", "--local_processes=2"]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-m", "launch.main", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changes = {"steps": 3, "optim__lr": 0.05, "mesh__data": 2, "mesh__fsdp": 2}
    loop.run(config(files, "rank=2", changes, reward_funcs="grounded", updates=2), tmp_path / "one")
    for one, two in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert one["train/reward"] == two["train/reward"] > 0
        assert_close(two["train/grad_norm"], one["train/grad_norm"], relative=1e-4)
