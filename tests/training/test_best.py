"""The best evaluation gives the adapter, a run stops early, and a killed run finds the same best step again."""

import json

import pytest

from lowrank.adapters.load import load_adapted
from lowrank.core.errors import UserError
from lowrank.evaluation.evaluator import Evaluator
from lowrank.training import loop
from lowrank.training.best import Best
from lowrank.training.config import CheckpointConfig
from lowrank.training.log import read_metrics
from tests.support.tiny_runs import config_of


def best_of(scores, **options):
    best = Best(CheckpointConfig(best="nll", **options), {"nll": "min"})
    improved = [step for step, score in enumerate(scores) if best.update(step, {"nll": score})]
    return best, improved


def test_lower_is_better_for_a_loss_and_higher_for_other_scores():
    best, improved = best_of([3.0, 2.0, 2.5, 1.0])
    assert (best.step, best.score, improved) == (3, 1.0, [0, 1, 3])
    other = Best(CheckpointConfig(best="accuracy"), {"accuracy": "max"})
    assert [other.update(i, {"accuracy": s}) for i, s in enumerate([0.5, 0.4, 0.6])] == [True, False, True]
    assert best_of([3.0, 4.0], mode="max")[1] == [0, 1]


def test_patience_counts_evaluations_without_enough_of_a_gain():
    best, improved = best_of([3.0, 2.95, 2.9, 2.0, 2.0, 2.5], min_delta=0.2, patience=2)
    assert improved == [0, 3]
    assert best.stale == 2
    assert best.exhausted
    assert not best_of([1.0] * 9)[0].exhausted  # patience 0 never stops a run


def test_nan_is_never_the_best():
    assert best_of([float("nan"), 2.0, float("nan")])[1] == [1]


def test_what_a_checkpoint_keeps_continues_the_count():
    first, _ = best_of([3.0, 2.0, 2.5], patience=5)
    second = Best(first.config, first.better)
    second.restore(json.loads(json.dumps(first.to_meta())))
    assert second == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best": "nll"}, "set eval.split to the held-out data and eval.every"),
        ({"best": "rouge"}, r"unknown score in checkpoint.best 'rouge'; known: nll, perplexity"),
        ({"patience": 2}, "name it in checkpoint.best"),
        ({"best": "nll", "mode": "low"}, r"unknown checkpoint.mode 'low'.*; known: auto, max, min"),
        ({"best": "nll", "min_delta": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(files, tmp_path, options, message):
    config = config_of(files, **{f"checkpoint__{key}": value for key, value in options.items()})
    with pytest.raises(UserError, match=message):
        loop.run(config, tmp_path / "run")


def run_with_scores(files, folder, monkeypatch, scores, **changes):
    """A run of six steps whose evaluations after steps 1, 2, ... find these scores."""
    count = iter(scores)
    monkeypatch.setattr(Evaluator, "scores", lambda self, params: {"nll": next(count), "tokens": 1.0})
    settings = {
        "eval__split": "train",
        "eval__every": 1,
        "eval__before": False,
        "checkpoint__best": "nll",
        "checkpoint__every": 2,
    }
    config = config_of(files, "rank=2", mesh__data=1, steps=6, optim__lr=0.05, **{**settings, **changes})
    return loop.run(config, folder)


def adapter_of(files, folder):
    params = load_adapted(folder / "adapter", str(files / "llama")).params
    return params["layers"]["attn"]["q"]["kernel"].b


def test_the_adapter_is_that_of_the_best_step(files, tmp_path, monkeypatch):
    summary = run_with_scores(files, tmp_path / "best", monkeypatch, [5.0, 4.0, 3.0, 3.5, 3.2, 3.1])
    assert (summary["best_step"], summary["best_nll"], summary["steps_done"]) == (3, 3.0, 6)
    assert summary["after"]["nll"] == 3.0
    monkeypatch.undo()
    last = config_of(files, "rank=2", mesh__data=1, steps=6, optim__lr=0.05)
    seen = {}
    place = loop.Trainer._save

    def save(self, done, **options):
        seen[done] = self.state.trained["layers"]["attn"]["q"]["kernel"].b
        return place(self, done, **options)

    monkeypatch.setattr(loop.Trainer, "_save", save)
    monkeypatch.setattr(loop.Checkpointer, "due", lambda self, step: True)
    loop.run(last, tmp_path / "last")
    assert (adapter_of(files, tmp_path / "best") == seen[3]).all()
    assert not (adapter_of(files, tmp_path / "best") == seen[6]).all()


def test_a_run_stops_when_patience_ends_and_is_finished(files, tmp_path, monkeypatch):
    scores = [5.0, 4.0, 4.5, 4.2]
    summary = run_with_scores(files, tmp_path / "run", monkeypatch, scores, checkpoint__patience=2)
    assert (summary["steps_done"], summary["best_step"]) == (4, 2)
    again = run_with_scores(files, tmp_path / "run", monkeypatch, [], checkpoint__patience=2)
    assert again == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_killed_run_finds_the_same_best_step(files, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed_at_five(self, done, previous):
        if done == 4:
            raise Killed

    scores = [5.0, 3.0, 4.0, 2.0, 4.0, 4.1]
    whole = run_with_scores(files, tmp_path / "whole", monkeypatch, scores)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_check_finite", killed_at_five)
        with pytest.raises(Killed):
            run_with_scores(files, tmp_path / "killed", patch, scores)
    rest = run_with_scores(files, tmp_path / "killed", monkeypatch, scores[2:])  # the checkpoint is of step 2
    assert {name: rest[name] for name in ("best_step", "best_nll")} == {"best_step": 4, "best_nll": 2.0}
    assert whole["best_step"] == 4
    assert (adapter_of(files, tmp_path / "killed") == adapter_of(files, tmp_path / "whole")).all()
    lines = [line["step"] for line in read_metrics(tmp_path / "killed" / "metrics.jsonl") if "eval/loss" in line]
    assert lines == [1, 2, 3, 4, 5, 6]
