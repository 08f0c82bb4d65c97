"""Runs of several processes, as on a pod, against one process of eight devices."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from configs import tiny as tiny_config
from lowrank.core.exit_codes import STOPPED
from lowrank.training import loop
from lowrank.training.log import read_metrics
from tests.support.close import assert_close
from tests.support.thinning import keep

STEPS = 200
ACROSS = {"data": 1, "context": 2, "tensor": 4}  # each process has half of the tokens of all rows
MESHES = {  # processes of eight devices, and the mesh
    "data": (2, {"data": 16}),
    "fsdp": (2, {"data": 1, "fsdp": 16}),
    "tensor": (2, {"data": 1, "tensor": 16}),
    "context": (2, {"data": 1, "context": 16}),
    "slices": (2, {"data": 4, "tensor": 4, "num_slices": 2}),
    "tensor across four hosts": (4, {"data": 1, "fsdp": 2, "tensor": 16}),
    "context across four hosts": (4, {"data": 2, "context": 8, "tensor": 2}),
    "every axis": (4, {"data": 4, "fsdp": 2, "context": 2, "tensor": 2, "num_slices": 4}),
}


def options_of(files, mesh, **changes):
    options = {"model.name": str(files / "llama"), "data.source": f"jsonl:{files / 'records.jsonl'}", **changes}
    return options | {f"mesh.{axis}": size for axis, size in mesh.items()}


def start(options, workdir, devices, *flags, **variables):
    """A process of a run with so many devices of its own."""
    words = [f"--config.{key}={value}" for key, value in options.items()] + list(flags)
    command = [sys.executable, "-m", "launch.main", "--config=configs/tiny.py:rank=2", f"--workdir={workdir}", *words]
    env = {**os.environ, **variables, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def start_under_slurm(options, workdir, devices, count):
    """The processes of a run, which find each other as those of a Slurm job do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    job = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": str(count)}
    tasks = [job | {"PROCID": str(rank), "LOCALID": str(rank)} for rank in range(count)]
    slurm = [{f"SLURM_{name}": value for name, value in task.items()} for task in tasks]
    distributed = "--config.distributed=true"
    return [start(options, workdir, devices, distributed, JAX_COORDINATOR_ADDRESS=address, **task) for task in slurm]


def run_here(options, workdir):
    config = tiny_config.get_config("rank=2")
    config.update_from_flattened_dict(options)
    config.distributed = True
    loop.run(config, workdir)


def losses(workdir):
    return [line["train/loss"] for line in read_metrics(workdir / "metrics.jsonl")]


def test_two_processes_train_stop_together_and_continue_as_one(files, tmp_path, monkeypatch):
    options = options_of(files, ACROSS, steps=STEPS) | {"checkpoint.every": 0}
    processes = start_under_slurm(options, tmp_path / "two", devices=4, count=2)
    log, give_up = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 300
    while all(p.poll() is None for p in processes) and time.monotonic() < give_up:
        if log.exists() and log.read_text().count("\n") >= 4:
            break
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # a pod warns one host; all of them stop at the same step
    texts = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [STOPPED, STOPPED], texts
    assert not (tmp_path / "two" / "summary.json").exists()
    two = losses(tmp_path / "two")
    assert 4 <= len(two) < STEPS
    assert f"stopped after step {len(two)}" in texts[0]

    monkeypatch.setattr(loop.StopSignal, "requested", lambda self, step: step >= len(two) + 3)
    run_here(options, tmp_path / "two")
    run_here(options, tmp_path / "one")
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), relative=1e-5)


@pytest.mark.parametrize("name", keep(MESHES, ()))
def test_a_mesh_across_processes_trains_as_one_process_which_reads_its_checkpoint(name, files, tmp_path):
    count, mesh = MESHES[name]
    changes = {"steps": 4, "data.batch_size": 16}
    launcher = start(options_of(files, mesh, **changes), tmp_path / "all", 8, f"--local_processes={count}")
    text, _ = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, text
    here = options_of(files, {"data": 8}, **changes)
    run_here(here, tmp_path / "one")
    want, got = losses(tmp_path / "one"), losses(tmp_path / "all")
    assert_close(got, want, relative=1e-5)
    shutil.rmtree(tmp_path / "all" / "checkpoints" / "4")
    run_here(here, tmp_path / "all")
    assert_close(losses(tmp_path / "all"), want, relative=1e-5)
