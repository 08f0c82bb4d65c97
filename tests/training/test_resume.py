import json
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from configs import tiny as tiny_config
from lowrank.training import loop
from lowrank.training.checkpoint import Checkpointer
from lowrank.training.log import read_metrics
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close

ARG, STEPS = "rank=2,dropout=0.1,bias=all", 30


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """What the runs override: `{key: value}`."""
    folder = tmp_path_factory.mktemp("tiny")
    model, records = tiny.llama(folder / "llama"), tiny.records(folder / "records.jsonl")
    return {"model.name": str(model), "data.source": f"jsonl:{records}", "steps": STEPS, "checkpoint.every": 5}


def _config(options, **mesh):
    config = tiny_config.get_config(ARG)
    config.update_from_flattened_dict(options)
    config.mesh.update(mesh)
    return config


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.run(_config(options), workdir)
    return workdir


def _final(workdir):
    """The last checkpoint's arrays by name, and its meta."""
    with Checkpointer(workdir / "checkpoints") as saver:
        step = saver.latest()
        meta = saver.meta(step)
    with ocp.PyTreeCheckpointer() as reader:
        path = workdir / "checkpoints" / str(step) / "arrays"
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in reader.metadata(path).item_metadata}
        return reader.restore(path, restore_args=as_numpy), meta


def _numbers(workdir):
    """The logged numbers, what depends on the clock aside."""
    clock = ("seconds", "train/tokens_per_s")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(workdir / "metrics.jsonl")]


def _assert_same_run(workdir, whole):
    (got, got_meta), (want, want_meta) = _final(workdir), _final(whole)
    assert sorted(got) == sorted(want)
    different = [name for name in want if np.asarray(got[name]).tobytes() != np.asarray(want[name]).tobytes()]
    assert not different
    assert got_meta == want_meta
    assert _numbers(workdir) == _numbers(whole)
    adapters = [load_file(w / "adapter" / "adapter_model.safetensors") for w in (workdir, whole)]
    assert {k: v.tobytes() for k, v in adapters[0].items()} == {k: v.tobytes() for k, v in adapters[1].items()}


def _killed(options, workdir, number):
    """Starts the run as a user would, and sends it a signal after a few steps; returns the finished process."""
    words = [f"--config.{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "launch.main", f"--config=configs/tiny.py:{ARG}", f"--workdir={workdir}", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, give_up = workdir / "metrics.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < give_up:
        if log.exists() and log.read_text().count("\n") >= 7:
            break
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def test_sigterm_saves_and_exits_cleanly_and_a_restart_continues_bit_for_bit(options, whole, tmp_path):
    code, said = _killed(options, tmp_path, signal.SIGTERM)
    assert code == 42, said
    with Checkpointer(tmp_path / "checkpoints") as saver:
        stopped = saver.latest()
    assert f"stopped after step {stopped}" in said
    assert len(_numbers(tmp_path)) == stopped
    assert 7 <= stopped < STEPS
    loop.run(_config(options), tmp_path)
    _assert_same_run(tmp_path, whole)


def test_after_kill_9_a_restart_continues_bit_for_bit(options, whole, tmp_path):
    code, said = _killed(options, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    with Checkpointer(tmp_path / "checkpoints") as saver:
        last = saver.latest()
    assert last is None or (last % 5 == 0 and last < STEPS)
    loop.run(_config(options), tmp_path)
    _assert_same_run(tmp_path, whole)


def test_a_checkpoint_continues_on_another_mesh(options, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step >= STEPS // 2)
        assert loop.run(_config(options), tmp_path) == {"stopped_at": STEPS // 2}
    loop.run(_config(options, data=1, fsdp=4, tensor=2), tmp_path)
    got, want = ([line["train/loss"] for line in _numbers(w)] for w in (tmp_path, whole))
    assert got[: STEPS // 2] == want[: STEPS // 2]
    assert_close(got, want, relative=1e-4)
    assert json.loads((tmp_path / "config.json").read_text())["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    arrays = _final(tmp_path)[0]
    for name, value in _final(whole)[0].items():
        if name.startswith("trained/"):
            assert_close(arrays[name], value, relative=2e-3)
