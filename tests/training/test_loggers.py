"""Every logger gets the finite numbers of process 0, and a resumed run continues its record."""

import importlib
import io
import math
import sys
import types

import pytest

from lowrank.core.errors import UserError
from lowrank.training.config import RunConfig
from lowrank.training.log import RunLog
from lowrank.training.loggers import LOGGERS, LoggedRun


class FakeRun:
    def __init__(self, id):
        self.id, self.lines, self.finished = id, [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.runs, module.Html = {}, str
    module.init = lambda *, id, **_: module.runs.setdefault(id or "new", FakeRun(id or "new"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class FakeClient:
    def __init__(self, tracking_uri):
        self.uri, self.runs = tracking_uri, {}

    def create_experiment(self, name, artifact_location):
        self.files = artifact_location
        return "3"

    def create_run(self, experiment, run_name):
        assert experiment == "3"
        self.runs["7"] = []
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="7"))

    def log_dict(self, id, values, path):
        self.runs[id].append((path, values))

    def log_batch(self, id, metrics):
        self.runs.setdefault(id, []).extend(metrics)

    def log_text(self, id, text, path):
        self.runs[id].append((path, text))

    def set_terminated(self, id):
        self.runs[id].append("done")


@pytest.fixture
def mlflow(monkeypatch):
    module = types.ModuleType("mlflow")
    module.clients = []
    module.is_tracking_uri_set = lambda: False
    module.MlflowClient = lambda tracking_uri: module.clients.append(FakeClient(tracking_uri)) or module.clients[-1]
    module.entities = types.SimpleNamespace(Metric=lambda key, value, time, step: (key, value, step))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_wandb_gets_every_finite_number_by_its_step_and_is_continued(wandb, tmp_path):
    with RunLog(tmp_path, 4, stream=io.StringIO(), loggers=("wandb",), config={"seed": 1}) as log:
        log.scalars(1, {"train/loss": 2.0, "train/odd": math.nan})
        log.text("samples", "a")
    assert wandb.runs["new"].lines == [{"step": 1, "train/loss": 2.0}, {"step": 0, "samples": "<pre>a</pre>"}]
    assert wandb.runs["new"].finished
    with RunLog(tmp_path, 4, start=1, stream=io.StringIO(), loggers=("wandb",)) as log:
        log.scalars(2, {"train/loss": 1.0})
    assert list(wandb.runs) == ["new"]
    assert wandb.runs["new"].lines[-1]["step"] == 2


def test_mlflow_writes_beside_the_run_unless_a_server_is_set_and_is_continued(mlflow, tmp_path):
    logger = LOGGERS["mlflow"](LoggedRun(tmp_path, 0, {"seed": 1}))
    logger.scalars(3, {"train/loss": 2.0, "train/odd": math.inf})
    logger.close()
    client = mlflow.clients[0]
    assert client.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert client.files == (tmp_path / "mlflow_files").as_uri()
    assert client.runs["7"] == [("config.json", {"seed": 1}), ("train/loss", 2.0, 3), "done"]
    LOGGERS["mlflow"](LoggedRun(tmp_path, 3, {})).scalars(4, {"train/loss": 1.0})
    assert mlflow.clients[1].runs == {"7": [("train/loss", 1.0, 4)]}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'lowrank\[{name}\]'"):
        LOGGERS[name](LoggedRun(tmp_path, 0, {}))


def test_an_unknown_logger_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match=r"unknown logger 'tensorbord' \(did you mean 'tensorboard'"):
        RunConfig(steps=1, model={}, method={}, data={}, loggers=("tensorbord",))


def test_every_logger_has_a_file_of_its_name():
    for name, make in LOGGERS.items():
        assert importlib.import_module(make.__module__).__name__ == f"lowrank.training.loggers.{name}"
