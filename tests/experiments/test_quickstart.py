import json

import pytest

from configs import common, quickstart
from experiments.quickstart import __main__ as command
from launch.evaluate import evaluate
from lowrank.core.errors import UserError
from lowrank.training import build
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    records = tiny.records(folder / "records.jsonl")
    return common.new(
        steps=2,
        model={"name": str(tiny.llama(folder / "llama"))},
        method={"name": "lora", "rank": 2, "target": quickstart.get_config().method.target},
        data={"source": f"jsonl:{records}", "split": "train", "template": "plain", "seq_len": 32, "batch_size": 4},
        optim={"lr": 0.05},
        mesh={"data": 1, "fsdp": 2, "tensor": 1},
        eval={"split": "train", "max_examples": 6, "texts": 5, "max_new": 4, "samples": 2},
    )


def test_the_job_shows_and_keeps_what_it_reached_and_its_adapter_scores_the_same(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "get_config", lambda: config)
    assert command.main(["quickstart", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rougeL_before"] == summary["before"]["rougeL"]
    assert summary["rougeL_after"] == summary["after"]["rougeL"]
    assert 0 < summary["trained_params"] < summary["total_params"]
    assert summary["seconds"] > 0
    assert len(summary["samples"]) == 2
    shown = capsys.readouterr().out
    for name in ("adapter", "loss.png", "report.md", "summary.json"):
        assert str(tmp_path / "run" / name) in shown
        assert (tmp_path / "run" / name).exists()
    for sample in summary["samples"]:
        assert all(sample[column].strip() in shown for column in ("reference", "before", "after"))
    assert f"{summary['trained_params']:,} of {summary['total_params']:,}" in shown

    assert_close(evaluate(config, tmp_path / "run"), summary["after"])

    assert command.main(["quickstart", str(tmp_path / "run")]) == 0  # a finished run is shown again, not repeated
    assert capsys.readouterr().out.strip().endswith(shown.strip())


def test_a_run_of_another_config_is_left_alone(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text('{"steps": 1}')
    monkeypatch.setattr(quickstart, "get_config", lambda: config)
    assert command.main(["quickstart", str(tmp_path)]) == 2
    assert "another config" in capsys.readouterr().err


def test_evaluation_needs_a_finished_run(config, tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        evaluate(config, tmp_path)


def test_evaluation_needs_a_split(config, tmp_path):
    unset = config.copy_and_resolve_references()
    unset.eval = {}
    assert build.build_run(unset).scorer is None
    with pytest.raises(UserError, match=r"eval\.split is not set"):
        evaluate(unset, tmp_path)
