"""The commands of a study: bad input, the plan, the local engine, and a training run that is stopped and continued."""

import io
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from launch import live_table, status, sweep, sweep_plan, worker
from launch.engines import local
from lowrank.core.paths import children
from lowrank.memory import devices, flops
from lowrank.memory.shapes import step_inputs
from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.folder import read_folder
from lowrank.sweeps.status import Status
from lowrank.training.build import build_run
from tests.support import dummy_cells
from tests.support.close import assert_close
from tests.support.tiny_runs import config_of

STUDY = """
from configs import tiny
from lowrank.sweeps.axes import axis
from lowrank.sweeps.study import Study
def get_study(arg=None):
    return Study("ranks", tiny.get_config(), axis("method.rank", [int(rank) for rank in (arg or "1+2").split("+")]))
"""


@pytest.fixture
def words(tmp_path, files, monkeypatch):
    """`words(ARG)`: the words of a study on the tiny model, whose cells are checked in this process."""
    (tmp_path / "study.py").write_text(STUDY)
    changes = [f"--config.model.name={files / 'llama'}", f"--config.data.source=jsonl:{files / 'records.jsonl'}"]
    monkeypatch.setattr(sweep, "_run_planner", lambda argv, target: sweep.main([sweep.PLANNER, *argv]))
    return lambda arg="1+2": [f"--study={tmp_path / 'study.py'}:{arg}", *changes, "--config.mesh.data=1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--study=FILE.py is required"),
        (["--study=none.py"], "study file 'none.py' cannot be read"),
        (["STUDY"], "--folder=DIR is required"),
        (["STUDY", "--engine=lokal", "--folder=f"], "unknown engine 'lokal' (did you mean 'local'?)"),
        (["STUDY", "--wrkers=2"], "unrecognized arguments: --wrkers=2"),
        (["STUDY", "--folder=f", "--workers=999"], "--workers=999 is not between 1 and"),
        (["STUDY", "--folder=f", "--devices=a,b"], "--devices=a,b is not a list of indices"),
        (["STUDY", "--folder=f", "--config.optim.lrr=3"], "unknown config key 'optim.lrr' (did you mean 'optim.lr'?)"),
        (["STUDY", "--folder=f", "--config.stps.x=3"], "unknown config key 'config.stps.x'"),
        (["STUDY", "--folder=s3:x", "--dry_run", "--device=h101"], "unknown device 'h101'"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(given, message, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expanded = [word for each in given for word in (words() if each == "STUDY" else [each])]
    assert sweep.main(expanded) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "f").exists()


def test_all_cells_are_checked_before_the_first_starts(words, capsys, tmp_path):
    assert sweep.main([*words("1+1000"), f"--folder={tmp_path / 'f'}"]) == 2
    assert "(method.rank=1000): rank 1000 is larger than" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_a_dry_run_lists_the_cells_their_cost_and_whether_they_fit(words, capsys, files, monkeypatch):
    assert sweep.main([*words(), "--dry_run", "--device=t4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == ["method.rank=1", "method.rank=2"]
    assert all(" yes " in line for line in lines[1:-1])
    run = build_run(config_of(files, "rank=2", mesh__data=1))
    study = sweep.read_study(words()[0].removeprefix("--study="), words()[1:])
    costs = list(sweep_plan.cell_costs(study, None))
    assert_close(float(costs[1].operations), 8.0 * flops.step_flops(run, step_inputs(run)).executed, relative=1e-9)
    monkeypatch.setitem(devices.MEMORY, "t4", 1e-6)
    assert sweep.main([*words(), "--dry_run", "--device=t4"]) == 1
    assert "no: " in capsys.readouterr().out


def test_a_run_that_ctrl_c_stops_is_continued_by_the_same_command(words, tmp_path, capsys):
    folder = tmp_path / "f"
    argv = [*words("2"), "--config.steps=240", "--config.checkpoint.every=60", f"--folder={folder}"]
    argv.append("--config.log_every=60")

    def interrupt():
        while not any(children(path / "checkpoints") for path in children(folder / "runs")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert sweep.main(argv) == 42
    thread.join()
    assert "the same command continues" in capsys.readouterr().out
    assert sweep.main(argv) == 0
    study = read_folder(folder)
    history = Ledger(folder, study.limits).histories([study.cells[0].key])[study.cells[0].key]
    assert [event["state"] for event in history.events] == ["claimed", "stopped", "claimed", "done"]
    assert history.last["summary"]["steps_done"] == 240
    assert "continuing after step" in study.log_path(history.key, 3).read_text()
    assert (folder / "table.csv").read_text().startswith("method.rank,seeds,")
    assert status.main([str(folder), f"--tables={tmp_path / 'tables'}"]) == 0
    assert "ranks: 1 cell, 1 done" in capsys.readouterr().out
    assert (tmp_path / "tables" / "table.tex").exists()


def run_locally(folder, script, monkeypatch, *flags, **settings):
    """`(exit code, study)` of the local engine on dummy cells."""
    study = dummy_cells.make_folder(folder, **settings)
    monkeypatch.setattr(worker, "worker_command", lambda folder: dummy_cells.worker_words(folder, script))
    monkeypatch.setattr(local, "POLL", 0.05)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    parser = sweep.command.Parser("sweep", None)
    local.add_flags(parser)
    return local.run(study, parser.parse_args(flags)), study


def test_a_failed_cell_is_reported_and_a_worker_that_is_killed_is_started_again(tmp_path, monkeypatch, capsys):
    script = """
        if seed == 0 and not (folder / "once").exists():
            (folder / "once").touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        finish() if seed < 2 else exit(1)
    """
    code, _ = run_locally(tmp_path, script, monkeypatch, count=3, limits={"lease": 1.0})
    output = capsys.readouterr().out
    assert code == 1
    assert "dummy: 3 cells, 2 done, 1 failed" in output
    assert "2 failures; exit code 1" in output


def test_workers_share_the_devices_and_cores():
    assert local._shares(["0", "1", "2", "3", "4"], 2) == ["0,1", "2,3,4"]
    found = local._environment("2,3")
    assert (found["CUDA_VISIBLE_DEVICES"], found["TPU_VISIBLE_CHIPS"]) == ("2,3", "2,3")
    assert found["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_live_table_shows_state_step_and_time_left(terminal, tmp_path):
    study = dummy_cells.make_folder(tmp_path, count=2)
    ledger, key = Ledger(tmp_path, study.limits), study.cells[0].key
    claim = ledger.claim(ledger.histories([key])[key], "me", 0.0)
    ledger.renew(claim, {"steps": 8, "step": 2, "seconds": 30.0})
    stream = io.StringIO()
    table = live_table.LiveTable(console=Console(file=stream, force_terminal=terminal, width=120))
    with table:
        table.show(Status(study))
    text = stream.getvalue()
    assert "dummy: 2 cells, 1 running, 1 waiting" in text
    assert all(word in text for word in (key, "2/8", "01:30"))
