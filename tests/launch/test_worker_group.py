"""A worker of several processes: the others run what the first one announces, and end with it."""

import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from launch import worker, worker_group
from lowrank.core.files import read_json, write_json
from lowrank.sweeps.folder import open_study
from lowrank.sweeps.results import read_results
from lowrank.sweeps.study import Study
from lowrank.training import loop
from lowrank.training.log import read_metrics
from tests.support import dummy_cells
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

TIMEOUT = 60


def start_process(folder, index, script, **options):
    """A process of a group whose runs are `script`."""
    code = f"""
        import pathlib, sys
        from launch import worker_group
        from lowrank.sweeps.folder import read_folder
        from tests.support import dummy_cells
        study = read_folder(pathlib.Path({str(folder)!r}))
        command = dummy_cells.command({script!r})
        if {index}:
            sys.exit(worker_group.Follower(study, "g", {index}, command).run(poll=0.02))
        sys.exit(worker_group.lead(study, "g", command, print, poll=0.02))
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.getcwd()}, stdout=subprocess.PIPE, text=True)


# A run of the first process ends when the follower's run of the same cell has noted itself.
FIRST = """
note("first")
assert sys.argv[-1] == "--config.distributed=True"
until = time.time() + 50
while f"other {key}" not in (folder.parent / "notes.txt").read_text():
    assert time.time() < until
    time.sleep(0.02)
finish()
"""
OTHER = """
note("other")
time.sleep(50)
"""


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_process_runs_each_cell_and_ends_with_the_first(tmp_path, order):
    study = dummy_cells.make_folder(tmp_path, 2)
    stale = {"id": "of an earlier start", "key": None, "end": 42}
    write_json(worker_group.announcement_path(study, "g"), stale)
    processes = {}
    for index in order:
        processes[index] = start_process(tmp_path, index, OTHER if index else FIRST)
        time.sleep(0.3)
    try:
        assert [processes[index].wait(TIMEOUT) for index in (0, 1)] == [0, 0]
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    keys = [cell.key for cell in study.cells]
    noted = dummy_cells.notes(tmp_path)
    assert sorted(line for line in noted if line.startswith("other")) == sorted(f"other {key}" for key in keys)
    assert sorted(line for line in noted if line.startswith("done")) == sorted(f"done {key}" for key in keys)


def test_a_follower_that_comes_after_the_end_of_the_study_ends_too(tmp_path):
    study = dummy_cells.make_folder(tmp_path, 1)
    assert worker_group.lead(study, "g", dummy_cells.command("finish()"), print, poll=0.02) == 0
    assert read_json(worker_group.announcement_path(study, "g"))["end"] == 0
    assert worker_group.Follower(study, "g", 1, dummy_cells.command("finish()")).run(poll=0.02) == 0


def test_a_run_of_an_earlier_announcement_is_ended(tmp_path):
    study = dummy_cells.make_folder(tmp_path, 1)
    path = worker_group.announcement_path(study, "g")
    write_json(path, {"id": "1", "key": study.cells[0].key, "end": None})
    process = start_process(tmp_path, 1, OTHER)
    try:
        until = time.monotonic() + TIMEOUT
        while f"other {study.cells[0].key}" not in dummy_cells.notes(tmp_path):
            assert time.monotonic() < until
            time.sleep(0.05)
        write_json(path, {"id": "2", "key": None, "end": 42})
        assert process.wait(TIMEOUT) == 42
    finally:
        process.kill()
        process.communicate()


def test_two_processes_of_a_worker_train_a_cell_as_one_process_does(files, tmp_path):
    changes = {"steps": 3, "checkpoint__every": 0, "data__batch_size": 2}
    config = config_of(files, "rank=2", mesh__data=2, **changes)
    study = open_study(Study("group", config, ({},)), tmp_path / "study")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    shared |= {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    words = [sys.executable, "-m", "launch.worker", str(study.path), "--group=g"]
    processes = [
        subprocess.Popen([*words, f"--process={i}"], env={**os.environ, **shared, "JAX_PROCESS_ID": str(i)})
        for i in range(2)
    ]
    one = loop.run(config_of(files, "rank=2", mesh__data=1, **changes), tmp_path / "one")
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    [result] = read_results(study, 0.0)
    assert result.state == "done"
    assert len(result.history.events) == 2
    losses = [
        [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (study.run_path(result.cell.key), tmp_path / "one")
    ]
    assert len(losses[0]) == 3
    assert_close(losses[0], losses[1], relative=1e-5)
    assert_close(result.summary["final_loss"], one["final_loss"], relative=1e-5)


@pytest.mark.parametrize("flags", [["--group=g"], ["--process=1"], ["--group=g", "--process=-1"]])
def test_a_group_needs_an_index(tmp_path, flags, capsys):
    dummy_cells.make_folder(tmp_path, 1)
    assert worker.main([str(tmp_path), *flags]) == 2
    assert "--group=NAME and --process=INDEX" in capsys.readouterr().err
