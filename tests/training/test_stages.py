"""Runs in stages: each starts from the one before, is scored and resumed by itself, and all are checked first."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from launch import adapters, status
from lowrank.core.errors import UserError
from lowrank.training import build, loop, stages, start
from tests.support.close import assert_close
from tests.support.resumed_runs import numbers
from tests.support.tiny_runs import config_of

DPO = {"name": "dpo", "objective": {"name": "preference"}, "start": "merge", "method": {"rank": 3}}
FOLDERS = ("1_continued", "2_sft", "3_dpo")


def config(files, *groups, arg="rank=2", **changes):
    changes = {"eval": {"split": "train", "max_examples": 8}, "loggers": (), "steps": 2, **changes}
    changes = {"checkpoint__every": 0, **changes}
    made = config_of(files, arg, optim__lr=0.05, mesh__data=1, **changes)
    pairs = {"data": {"source": f"jsonl:{files / 'pairs.jsonl'}"}}
    made.stages = [{**pairs, **group} if "objective" in group else group for group in groups]
    return made


def three(files, **changes):
    return config(files, {"name": "continued", "optim": {"lr": 0.02}}, {"name": "sft"}, DPO, **changes)


def test_continued_then_supervised_then_preferences_in_one_command(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop.report, "plot_losses", lambda folder: None)  # a second of each stage
    made = three(files)
    summary = stages.run(made, tmp_path, "the command")
    continued, sft, dpo = summary["stages"]
    assert sft["before"] == continued["after"]  # the adapter is carried, and both are scored on the same records
    assert sft["after"]["nll"] < sft["before"]["nll"] < continued["before"]["nll"]
    assert_close(dpo["before"]["loss"], np.log(2), relative=1e-5)  # the reference is the merged model
    assert dpo["before"]["accuracy"] == 0
    assert dpo["after"]["margin"] > 0
    methods = [json.loads((tmp_path / name / "adapter" / "method.json").read_text())["method"] for name in FOLDERS]
    assert [method["rank"] for method in methods] == [2, 2, 3]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    report = (tmp_path / "report.md").read_text()
    assert f"| sft | carry | causal_lm | lora | 2 | perplexity | {sft['before']['perplexity']:.4g} |" in report
    assert all((tmp_path / name / "report.md").exists() for name in FOLDERS)
    base = str(tmp_path / "3_dpo" / start.MERGED_BASE)
    assert adapters.adapter_of_run(tmp_path / "3_dpo")[1] == base
    capsys.readouterr()
    assert status.main([str(tmp_path)]) == 0
    assert "sft        done  perplexity" in capsys.readouterr().out
    assert stages.run(made, tmp_path, "the command") == summary  # nothing is trained again
    made.stages[1]["steps"] = 3
    with pytest.raises(UserError, match=r"holds another config's run: stages.1.\.steps is absent there and 3 here"):
        stages.run(made, tmp_path)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([{"name": "a", "stepz": 3}], r"unknown config key 'stages.0..stepz' \(did you mean 'stages.0..steps'\?\)"),
        ([{"name": "a"}, {"name": "b", "optim": {"lrr": 1}}], r"stage b: unknown config key 'optim.lrr' .did you mean"),
        ([{"name": "a"}, {"name": "b", "start": "cary"}], r"unknown stages.1..start 'cary' .did you mean 'carry'"),
        ([{"name": "a"}, {"name": "a"}], "stages.1..name=a names two stages"),
        ([{"steps": 1}], "stages.0..name='' must be a word"),
        ([{"name": "a", "start": "merge"}], "stages.0..start=merge has no stage before it: set model.adapter"),
        ([{"name": "a", "model": {"name": "b"}}], "stages.0..model.name is that of all stages"),
        ([], "stages must be a list of groups"),
        (["a"], "stages.0. must be a group of keys"),
        (
            [{"name": "sft"}, {**DPO, "start": "carry", "method": {"name": "dora"}}],
            "stage dpo: method.name=dora in the config, and the adapter of stage sft is of lora: leave it out, as",
        ),
        (
            [{"name": "sft", "method": {"name": "prompt", "length": 2}}, {**DPO, "method": {"name": "bitfit"}}],
            "stage dpo: the adapter of stage sft cannot be merged, as its leaf prompt/embedding has no place",
        ),
    ],
)
def test_all_stages_are_checked_before_the_first_step(groups, text, files, tmp_path, monkeypatch):
    monkeypatch.setattr(build.Run, "load", lambda self: pytest.fail("weights were read"))
    made = config(files, *groups)
    with pytest.raises(UserError, match=text):
        stages.run(made, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_stage_on_preferences_is_refused_for_an_encoder_before_weights_are_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(build.Run, "load", lambda self: pytest.fail("weights were read"))
    classify = {
        "name": "classify",
        "objective": "classification",
        "data": {"template": "{text}", "completion": "{label}"},
    }
    made = config(files, classify, {**DPO, "start": "carry", "method": {}}, model=str(files / "bert"))
    with pytest.raises(UserError, match=r"stage dpo: .*is an encoder, which predicts no next token"):
        stages.run(made, tmp_path)


@pytest.mark.all
def test_a_changed_adapter_is_refused_when_the_run_resumes(files, tmp_path, monkeypatch):
    made = config_of(files, "rank=2", optim__lr=0.05, mesh__data=1, steps=2)
    loop.run(made, tmp_path / "a")
    made.model.adapter = str(tmp_path / "a" / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step >= 1)
        assert loop.run(made, tmp_path / "b") == {"stopped_at": 1}
    path = tmp_path / "a" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"has changed since the run in .*b started from it"):
        loop.run(made, tmp_path / "b")
    made.model.start = "merge"
    start.with_merged_base(build.build_run(made), tmp_path / "c")
    start.with_merged_base(build.build_run(made), tmp_path / "c")
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(UserError, match=r"merged_base was made of another base or adapter"):
        start.with_merged_base(build.build_run(made), tmp_path / "c")


@pytest.mark.all
def test_after_kill_9_in_any_stage_the_same_command_continues_bit_for_bit(files, tmp_path):
    path = tmp_path / "recorded.json"
    path.write_text(json.dumps({**three(files, steps=12, checkpoint__every=3).to_dict(), "notes": [], "loggers": []}))
    words = [sys.executable, "-m", "launch.main", f"--config=launch/recorded.py:{path}", "--programs="]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*words, f"--workdir={whole}"], check=True, capture_output=True)
    for name in FOLDERS:
        process = subprocess.Popen(
            [*words, f"--workdir={killed}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        log, give_up = killed / name / "metrics.jsonl", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < give_up:
            if log.exists() and log.read_text().count("train/loss") >= 4:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / name / "summary.json").exists()
    subprocess.run([*words, f"--workdir={killed}"], check=True, capture_output=True)
    for name in FOLDERS:
        assert numbers(killed / name) == numbers(whole / name)
        ours, theirs = (load_file(w / name / "adapter" / "adapter_model.safetensors") for w in (killed, whole))
        assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
