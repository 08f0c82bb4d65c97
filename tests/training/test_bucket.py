"""A run in a bucket is trained, killed, continued, reported and read back, with the numbers of a local run."""

import functools
import http.server
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import evaluate
from lowrank.adapters import load
from lowrank.core import generations, paths
from lowrank.core.errors import UserError
from lowrank.core.files import read_json, write_text
from lowrank.core.lease import Lease
from lowrank.core.tree import named_leaves
from lowrank.training import loop, workdir
from lowrank.training.checkpoint import Checkpointer
from lowrank.training.log import RunLog, read_metrics
from lowrank.training.loggers import LOGGERS, LoggedRun
from lowrank.training.profile import Profile
from tests.support.bucket import environment
from tests.support.tiny_runs import config_of

ARG, STEPS, EVERY = "rank=2,dropout=0.1", 30, 5


@pytest.fixture
def short_leases(monkeypatch):
    """A killed run holds its folder for two seconds."""
    monkeypatch.setattr(workdir, "Lease", functools.partial(Lease, seconds=2.0))


def config(files):
    return config_of(files, ARG, steps=STEPS, checkpoint__every=EVERY, mesh__data=1)


def killed(files, url):
    """Starts the run as a user would, and kills it once it has a checkpoint; returns what it printed."""
    flags = {"model.name": files / "llama", "data.source": f"jsonl:{files / 'records.jsonl'}"}
    flags |= {"steps": STEPS, "checkpoint.every": EVERY, "mesh.data": 1}
    words = [f"--config.{key}={value}" for key, value in flags.items()]
    command = [sys.executable, "-m", "launch.main", f"--config=configs/tiny.py:{ARG}", f"--workdir={url}", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    give_up = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < give_up:
        if paths.exists(f"{url}/checkpoints/{EVERY}/commit_success.txt"):
            break
        time.sleep(0.01)
    process.kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGKILL, said
    return said


def numbers(folder):
    """The logged numbers without those of the clock."""
    clock = ("seconds", "train/tokens_per_s")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(f"{folder}/metrics.jsonl")]


def logged_steps(url, tmp_path):
    """The steps whose losses TensorBoard reads from the run's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in paths.children(f"{url}/tensorboard"):
        (tmp_path / path.name).write_bytes(paths.read_bytes(path))
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    return [event.step for event in reader.Scalars("train/loss")]


def test_a_killed_run_continues_bit_for_bit_as_in_a_local_folder(files, bucket, tmp_path, short_leases):
    url, events = f"{bucket}/{tmp_path.name}", tmp_path / "events"
    killed(files, url)
    with Checkpointer(f"{url}/checkpoints") as saver:
        assert EVERY <= (last := saver.latest()) < STEPS
    assert len(numbers(url)) >= last
    summary = loop.run(config(files), url)
    local = tmp_path / "local"
    assert loop.run(config(files), local)["final_loss"] == summary["final_loss"]
    assert numbers(url) == numbers(local)
    events.mkdir()
    assert logged_steps(url, events) == list(range(1, STEPS + 1))
    ours, theirs = (paths.read_bytes(f"{folder}/adapter/adapter_model.safetensors") for folder in (url, local))
    assert ours == theirs
    check_readers(files, url, local, summary)


def check_readers(files, url, local, summary):
    """The finished run is found as such, and its report and its adapter are read."""
    assert loop.run(config(files), url) == read_json(f"{url}/summary.json")
    assert summary["steps_done"] == STEPS
    assert f"| {STEPS} |" in (report := paths.read_text(f"{url}/report.md"))
    assert "| `adapter` | " in report
    adapted = [load.load_adapted(f"{folder}/adapter", str(files / "llama")).params for folder in (url, local)]
    jax.tree.map(np.testing.assert_array_equal, *adapted)
    assert any(name.endswith("/a") for name, _ in named_leaves(adapted[0]))
    scored = config(files)
    scored.eval.update({"split": "train", "max_examples": 4})
    assert 0 < evaluate.evaluate(scored, url)["nll"] < math.log(1000)


def test_a_second_run_on_a_held_folder_is_refused(files, bucket, tmp_path, short_leases):
    url = f"{bucket}/{tmp_path.name}"
    held = rf"workdir {url} is in use by another run \(process \d+ on .*\)"
    with workdir.lock(paths.as_path(url)), pytest.raises(UserError, match=held):
        loop.run(config(files), url)
    assert [path.name for path in paths.children(url)] == [".lock"]


def test_a_run_that_has_lost_its_folder_writes_no_checkpoint(files, bucket, tmp_path, monkeypatch):
    url = f"{bucket}/{tmp_path.name}"

    def lost(self):
        raise UserError("lost")

    monkeypatch.setattr(Lease, "check", lost)
    with pytest.raises(UserError, match="lost"):
        loop.run(config(files), url)
    assert paths.children(f"{url}/checkpoints") == []


def test_a_bucket_that_is_not_there_is_named_before_any_compute(files, bucket, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", lambda *unused: pytest.fail("the run has started"))
    with pytest.raises(UserError, match=r"cannot write gs://lowrank-tests-none/run/\.lock: No such object or bucket"):
        loop.run(config(files), f"{bucket}-none/run")


class Forbidding(http.server.BaseHTTPRequestHandler):
    """A bucket of which everything may be read, and nothing written."""

    def do_GET(self):
        self._answer(404)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(403)

    def _answer(self, code):
        body = json.dumps({"error": {"code": code, "message": "no storage.objects.create access"}}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_bucket_without_rights_is_named_before_any_compute(files, bucket, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", lambda *unused: pytest.fail("the run has started"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        generations._client.cache_clear()
        with environment({"STORAGE_EMULATOR_HOST": address}):
            with pytest.raises(
                UserError, match=r"cannot write gs://b/run/\.lock: 403 .*no storage.objects.create access"
            ):
                loop.run(config(files), "gs://b/run")
            with pytest.raises(
                UserError, match=r"cannot write gs://b/a: Forbidden: .*no storage.objects.create access"
            ):
                write_text("gs://b/a", "")
        generations._client.cache_clear()
        server.shutdown()


def test_a_log_in_a_bucket_loses_no_line_at_a_resume(bucket, tmp_path, monkeypatch):
    url = f"{bucket}/{tmp_path.name}"
    first = RunLog(url, 9)
    for step in (1, 2, 3):
        first.scalars(step, {"train/loss": 1.0 / step})
    first.flush()
    first.scalars(4, {"train/loss": 0.2})  # not yet copied when the process is killed
    with RunLog(url, 9, start=2) as log:
        assert [line["step"] for line in read_metrics(f"{url}/metrics.jsonl")] == [1, 2]
        log.scalars(3, {"train/loss": 7.0})
    assert [line["step"] for line in read_metrics(f"{url}/metrics.jsonl")] == [1, 2, 3]
    assert len(paths.children(f"{url}/tensorboard")) == 2
    first.close()


def test_a_trace_reaches_the_bucket(bucket, tmp_path, monkeypatch):
    folder = paths.as_path(bucket) / tmp_path.name
    monkeypatch.setattr(jax.profiler, "start_trace", lambda local: (Path(local) / "a.xplane.pb").write_text("trace"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    with Profile(folder, 1, 3) as profile:
        for step in range(3):
            with profile.before(step):
                pass
    assert paths.read_text(folder / "profile" / "a.xplane.pb") == "trace"


def test_mlflow_without_a_server_is_refused_in_a_bucket(bucket, monkeypatch):
    module = type(sys)("mlflow")
    module.is_tracking_uri_set = lambda: False
    monkeypatch.setitem(sys.modules, "mlflow", module)
    with pytest.raises(UserError, match=r"'mlflow' cannot keep a database in gs://.*: set MLFLOW_TRACKING_URI"):
        LOGGERS["mlflow"](LoggedRun(paths.as_path(bucket), 0, {}))
