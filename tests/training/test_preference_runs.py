"""Runs on preferences: they compare with their start, whatever the method; a resumed run does so too."""

import json

import jax
import numpy as np
import pytest

from launch.evaluate import evaluate
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.objectives.preference_losses import LOSSES
from lowrank.training import build, loop, step
from lowrank.training.reference import StoredReference
from tests.support.close import assert_close
from tests.support.resumed_runs import whole_and_resumed
from tests.support.thinning import keep
from tests.support.tiny_runs import config_of

# A method of each kind: of those but LoRA, the start is not the base, or switching the adapter off gives no model.
METHODS = {
    "lora": "rank=2",
    "pissa": "init=pissa,rank=2",
    "prompt": "method=prompt,length=4",
    "bitfit": "method=bitfit",
    "intrinsic": "method=intrinsic,dim=16",
    "relora": "method=relora,rank=2",
}
COPIED = {"name": "preference", "reference": "copied"}
START = 1e-5  # float32 log-probabilities of two programs


def config(files, method="lora", objective="preference", **changes):
    source = {"data__source": f"jsonl:{files / 'pairs.jsonl'}", "checkpoint__every": 0, "mesh__data": 1}
    made = config_of(files, METHODS.get(method, method), **{**source, "steps": 4, **changes})
    with made.ignore_type():
        made.objective = objective
    return made


def first_step(made):
    """`(metrics, trained leaves)` of the first step of a config, at a rate of 0.1 and without a checkpoint."""
    run = build.build_run(made)
    optimizer = run.optimizer()
    state, frozen, _ = run.start(run.load().params, optimizer)
    reference = StoredReference(run)
    reference.fill(tree.join(state.trained, frozen))
    batch = run.put(reference.join(next(run.loader)))
    program = step.compile_step(run.step(optimizer), state, frozen, batch)
    state, metrics = program(state, frozen, batch, np.float32(0.1))
    return jax.device_get((metrics, state.trained))


@pytest.mark.parametrize("method", keep(METHODS, ["lora", "pissa", "prompt", "bitfit", "intrinsic"]))
def test_at_the_start_the_loss_is_log_2_and_rewards_are_0_whatever_the_method(method, files):
    run = build.build_run(config(files, method))
    params = run.attach(run.load().params)[0]
    reference = StoredReference(run)
    reference.fill(params)
    batch = run.put(reference.join(next(run.loader)))
    total, weight, sums = jax.device_get(jax.jit(lambda params: run.loss(params, batch, None))(params))
    assert_close(total / weight, np.log(2), relative=START)
    assert sums["rewards/accuracies"][0] == 0
    for name in ("chosen", "rejected", "margins"):
        assert_close(sums[f"rewards/{name}"][0], 0.0, relative=START, size=-sums["logps/rejected"][0])


def test_dropout_is_off_in_the_reference(files):
    run = build.build_run(config(files, METHODS["lora"] + ",dropout=0.5"))
    params = run.attach(run.load().params)[0]
    moved = jax.tree.map(lambda x, learns: x + 0.1 if learns else x, params, run.mask)
    batch = run.put(next(run.loader))
    plain = build.build_run(config(files, METHODS["lora"])).compared(moved, moved, batch, adds_reference=True)
    assert_close(run.compared(moved, moved, batch, adds_reference=True)["reference"], plain["reference"])


OBJECTIVES = {
    "preference": "preference",
    "bco": {"name": "preference", "loss": "bco"},
    "copied": COPIED,
    "kto": "kto",
    **{name: {"name": "preference", "loss": name} for name in LOSSES if name not in ("dpo", "bco")},
    "reward": "reward",
}


@pytest.mark.parametrize("name", keep(OBJECTIVES, ["bco"]))
def test_microbatches_change_nothing(name, files):
    found = []
    for accumulate in (1, 4) if name == "bco" else (1, 2, 4):  # two programs take less time than three
        changes = {"optim__accumulate": accumulate, "optim__name": "sgd", "optim__clip": 0.0}
        found.append(first_step(config(files, objective=OBJECTIVES[name], **changes)))
    for other in found[1:]:
        assert_close(other[0]["grad_norm"], found[0][0]["grad_norm"], relative=1e-4)
        assert_close(other[1], found[0][1], relative=1e-4)


RESUMED = [
    f"{objective} {method}"
    for objective in ("preference", "copied", "kto", "reward")
    for method in METHODS
    if method != "relora" or objective in ("preference", "reward")  # a copy of the start is refused with its restarts
]
KEPT = ["preference lora", "kto lora", "kto bitfit", "reward pissa", "reward intrinsic"]


@pytest.mark.parametrize("case", keep(RESUMED, KEPT))
def test_a_resumed_run_is_the_same_bit_for_bit(case, files, tmp_path, monkeypatch):
    objective, method = case.split()
    made = config(files, method, OBJECTIVES[objective], steps=2, optim__lr=0.05, mesh__fsdp=2)
    whole, resumed = whole_and_resumed(made, tmp_path, monkeypatch, stop=1)
    assert resumed == whole
    assert any(line.get("train/grad_norm", 0) > 0 for line in whole)


@pytest.mark.all
def test_a_copy_and_stored_values_are_the_same_reference(files, tmp_path):
    changes = {"optim__lr": 0.05, "eval": {"split": "train", "max_examples": 8}}
    stored = loop.run(config(files, "pissa", **changes), tmp_path / "stored")
    copied = loop.run(config(files, "pissa", COPIED, **changes), tmp_path / "copied")
    assert_close(copied["final_loss"], stored["final_loss"], relative=1e-4)
    assert stored["before"]["accuracy"] == 0
    assert_close(stored["before"]["loss"], np.log(2), relative=START)
    assert stored["after"]["margin"] > 0
    assert_close(copied["after"]["margin"], stored["after"]["margin"], relative=1e-3)
    assert_close(evaluate(config(files, "pissa", **changes), tmp_path / "stored"), stored["after"], relative=START)


def test_a_model_of_rewards_learns_pairs_and_the_command_gives_its_accuracy(files, tmp_path):
    changes = {"steps": 12, "optim__lr": 0.05, "eval": {"split": "train"}}
    made = config(files, objective={"name": "reward", "centering": 0.01}, **changes)
    summary = loop.run(made, tmp_path)
    assert summary["after"]["accuracy"] > 0.9
    assert_close(evaluate(made, tmp_path)["accuracy"], summary["after"]["accuracy"])
    assert "accuracy" in json.loads((tmp_path / "summary.json").read_text())["after"]


@pytest.mark.parametrize(
    ("objective", "changes", "text"),
    [
        ("preference", {"data__source": "records.jsonl"}, "holds no pairs: the field 'chosen' is missing"),
        ("kto", {"data__label_field": "chosen"}, "chosen must be true or false"),
        ("kto", {"data__batch_size": 1}, "data.batch_size=1"),
        ("preference", {"model__name": "bert"}, "is an encoder, which predicts no next token"),
        ("reward", {"model__name": "bert"}, "is an encoder, and a model of rewards is made of a decoder"),
        ({"name": "preference", "loss": "dop"}, {}, "unknown objective.loss 'dop' .did you mean 'dpop'"),
        ({"name": "preference", "reference": "store"}, {}, "unknown objective.reference 'store'"),
        ({"name": "preference", "bata": 0.1}, {}, "unknown config key 'objective.bata' .did you mean 'objective.beta'"),
        ({"name": "preference", "beta": 0.0}, {}, "objective.beta=0.0 must be above 0"),
        ({"name": "preference", "sft": -1.0}, {}, "objective.sft=-1.0 must be 0 or more"),
        ({"name": "kto", "desirable_weight": 0.0}, {}, "objective.desirable_weight=0.0 must be above 0"),
        ({"name": "reward", "centering": -0.1}, {}, "objective.centering=-0.1 must be 0 or more"),
    ],
)
def test_bad_input_is_refused_before_a_weight_is_read(objective, changes, text, files, monkeypatch):
    changes = {key: str(files / x) if key == "model__name" else x for key, x in changes.items()}
    if "data__source" in changes:
        changes["data__source"] = f"jsonl:{files / changes['data__source']}"
    monkeypatch.setattr(build.Run, "load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=text):
        build.build_run(config(files, objective=objective, **changes))


@pytest.mark.parametrize("objective", [COPIED, "kto"])
def test_a_copy_of_the_start_is_refused_where_restarts_change_frozen_leaves(objective, files):
    with pytest.raises(UserError, match="restarts change frozen leaves"):
        build.build_run(config(files, "relora", objective))
