"""The loggers write what the real packages read back, before and after a resume."""

import io
import json

import pytest

from lowrank.training.log import RunLog


def write_steps(folder, name, start):
    with RunLog(folder, 4, start=start, stream=io.StringIO(), loggers=(name,), config={"seed": 1}) as log:
        for step in (start + 1, start + 2):
            log.scalars(step, {"train/loss": 3.0 / step, "train/odd": float("nan")})
        log.text("samples", "**a text**", start + 2)


@pytest.mark.filterwarnings("ignore")  # of the packages, about themselves
def test_mlflow_reads_back_every_step_of_a_resumed_run(tmp_path, monkeypatch):
    import mlflow

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # nothing is written into the working directory
    for start in (0, 2):
        write_steps(tmp_path, "mlflow", start)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = json.loads((tmp_path / "mlflow_run.json").read_text())["id"]
    history = client.get_metric_history(run, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75)]
    assert client.get_run(run).info.status == "FINISHED"
    assert (tmp_path / "mlflow_files").is_dir()
    assert not list(elsewhere.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_wandb_continues_one_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for start in (0, 2):
        write_steps(tmp_path, "wandb", start)
        ids.append(json.loads((tmp_path / "wandb_run.json").read_text())["id"])
    assert ids[0] == ids[1]
    files = [path for path in tmp_path.rglob("*.wandb") if ids[0] in path.name]
    assert len(files) == 2
    assert all(path.stat().st_size > 0 for path in files)
