"""Two processes of four devices each, as on a pod, against one process of eight."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from configs import tiny as tiny_config
from lowrank.training import loop
from lowrank.training.log import read_metrics
from tests.support import tiny_checkpoint as tiny
from tests.support.close import assert_close

MESH = {"data": 2, "fsdp": 4, "tensor": 1}  # fsdp spans the processes' halves of the rows
STEPS = 200


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, records = tiny.llama(folder / "llama"), tiny.records(folder / "records.jsonl")
    mesh = {f"mesh.{axis}": size for axis, size in MESH.items()}
    return {"model.name": str(model), "data.source": f"jsonl:{records}", "steps": STEPS, "checkpoint.every": 0, **mesh}


def _start(options, workdir, rank, port):
    words = [f"--config.{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "launch.main", "--config=configs/tiny.py:rank=2", f"--workdir={workdir}", *words]
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(rank), "LOCALID": str(rank)}
    env = {
        **os.environ,
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    command.append("--config.distributed=true")
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_train_stop_together_and_continue_as_one(options, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [_start(options, tmp_path / "two", rank, port) for rank in (0, 1)]
    log, give_up = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 300
    while all(p.poll() is None for p in processes) and time.monotonic() < give_up:
        if log.exists() and log.read_text().count("\n") >= 4:
            break
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # a pod warns one host; all of them stop at the same step
    said = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    two = [line["train/loss"] for line in read_metrics(log)]
    assert 4 <= len(two) < STEPS
    assert f"stopped after step {len(two)}" in said[0]

    config = tiny_config.get_config("rank=2")
    config.update_from_flattened_dict(options)
    config.distributed = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step >= len(two) + 3)
        loop.run(config, tmp_path / "two")
        loop.run(config, tmp_path / "one")
    one, two = ([x["train/loss"] for x in read_metrics(tmp_path / w / "metrics.jsonl")] for w in ("one", "two"))
    assert_close(two, one, relative=1e-5)
