"""Workers: no cell is lost or counted twice, whatever happens to a worker; and every way in which a run can end."""

import signal
import time

import pytest

from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.worker import Worker
from tests.support import dummy_cells


def histories(study: StudyFolder):
    found = Ledger(study.path, study.limits).histories([cell.key for cell in study.cells])
    return [found[cell.key] for cell in study.cells]


def states(study):
    return [[event["state"] for event in history.events] for history in histories(study)]


def work(study, script, **options):
    """`(exit code, lines)` of a worker in this process."""
    lines = []
    return Worker(study, dummy_cells.command(script), lines.append, poll=0.01, **options).run(), lines


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


@pytest.fixture
def processes():
    """A list of processes, which are killed at the end of the test."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_no_cell_is_lost_or_counted_twice_if_one_worker_is_killed_and_one_is_paused(tmp_path, processes):
    study, script = dummy_cells.make_folder(tmp_path, count=8, limits={"lease": 1.5}), "time.sleep(0.3); finish()"
    names = ("killed", "paused", "steady")
    processes += [dummy_cells.start_worker(tmp_path, script, name=name) for name in names]

    def holds(name):
        last = [history.last for history in histories(study)]
        return any(event.get("owner") == name and event["state"] == "claimed" for event in last)

    until(lambda: holds("killed"))
    processes[0].kill()
    until(lambda: holds("paused"))
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[2].wait(timeout=120) == 0
    assert [found[-1] for found in states(study)] == ["done"] * 8
    processes[1].send_signal(signal.SIGCONT)
    assert processes[1].wait(timeout=60) == 0
    assert [found[-1] for found in states(study)] == ["done"] * 8
    assert [found.count("done") for found in states(study)] == [1] * 8
    assert sum(history.stops for history in histories(study)) >= 1  # the killed worker's cell was taken over
    assert dummy_cells.notes(tmp_path)[-1].startswith("done")


@pytest.mark.parametrize(
    ("script", "expected", "why"),
    [
        ("finish()", ["claimed", "done"], None),
        ("exit(0)", ["claimed", "failed"] * 2, "it ended with exit code 0 and without summary.json"),
        ("print('error: no such key'); exit(2)", ["claimed", "refused"], "exit code 2: error: no such key"),
        ("print('error: loss is nan'); exit(3)", ["claimed", "diverged"], "exit code 3: error: loss is nan"),
        ("print('x\\nValueError: y'); exit(1)", ["claimed", "failed"] * 2, "exit code 1: ValueError: y"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["claimed", "failed"] * 2, "signal SIGKILL: it has written nothing"),
        ("finish() if len(list(folder.iterdir())) else ((folder / 'x').touch(), exit(1))",
         ["claimed", "failed", "claimed", "done"], None),
        ("finish() if len(list(folder.iterdir())) else ((folder / 'x').touch(), exit(42))",
         ["claimed", "stopped", "claimed", "done"], None),
    ],
)  # fmt: skip
def test_every_ending_of_a_run_and_what_follows(script, expected, why, tmp_path):
    study = dummy_cells.make_folder(tmp_path, count=1, limits={"lease": 0.2})
    assert work(study, script)[0] == 0
    assert states(study) == [expected]
    assert histories(study)[0].last.get("why") == why


def test_a_failed_cell_is_tried_once_more_and_stops_no_other(tmp_path):
    study = dummy_cells.make_folder(tmp_path, count=3)
    code, lines = work(study, "finish() if seed != 1 else exit(1)")
    assert code == 0
    assert [found[-1] for found in states(study)] == ["done", "failed", "done"]
    assert states(study)[1].count("failed") == 2
    assert sum("failed: exit code 1" in line for line in lines) == 2


def test_a_cell_that_is_preempted_without_end_is_given_up(tmp_path):
    study = dummy_cells.make_folder(tmp_path, count=1, limits={"lease": 0.04, "stops": 2})
    assert work(study, "exit(42)")[0] == 0
    assert states(study) == [["claimed", "stopped"] * 3]


@pytest.mark.parametrize(
    ("limits", "script", "why"),
    [
        ({"timeout": 0.3}, "while True: print(1, flush=True); time.sleep(0.05)", "longer than limits.timeout=0.3 s"),
        ({"stall": 0.3}, "print(1, flush=True); time.sleep(600)", "said nothing for limits.stall=0.3 s"),
        ({"stall": 0.3}, "signal.signal(15, lambda *_: None)\nwhile True: time.sleep(600)", "limits.stall=0.3 s"),
    ],
)
def test_a_cell_that_hangs_is_killed(limits, script, why, tmp_path):
    study = dummy_cells.make_folder(tmp_path, count=1, limits={"retries": 0, **limits})
    assert work(study, script, grace=0.2)[0] == 0
    assert states(study) == [["claimed", "failed"]]
    assert why in histories(study)[0].last["why"]


def test_a_worker_that_is_asked_to_stop_lets_its_cell_save_and_another_one_continues_it(tmp_path, processes):
    study = dummy_cells.make_folder(tmp_path, count=2)
    script = """
        if (folder / "saved").exists():
            finish(resumed=True)
        else:
            signal.signal(15, lambda *unused: ((folder / "saved").touch(), exit(42)))
            note("ready")
            time.sleep(600)
    """
    processes += [dummy_cells.start_worker(tmp_path, script)]
    until(lambda: any(note.startswith("ready") for note in dummy_cells.notes(tmp_path)))
    processes[0].terminate()
    assert processes[0].wait(timeout=60) == 42
    assert states(study) == [["claimed", "stopped"], []]
    assert work(study, "finish(resumed=(folder / 'saved').exists())")[0] == 0
    assert [history.last["summary"]["resumed"] for history in histories(study)] == [True, False]


def test_leases_go_by_the_clock_of_the_folder_and_a_clock_that_is_off_is_reported(tmp_path, monkeypatch):
    study, hour = dummy_cells.make_folder(tmp_path, count=1), 3600.0
    ledger, key, now = Ledger(tmp_path, study.limits), study.cells[0].key, time.time()
    worker = Worker(study, dummy_cells.command("finish()"), name="late")
    held = ledger.claim(ledger.histories([key])[key], "other", now)
    monkeypatch.setattr("lowrank.sweeps.worker.time.time", lambda: now + hour)
    open_cells = worker._open_histories()
    assert not worker._run_one(open_cells, worker._now())  # the lease has not ended, though this clock says so
    assert ledger.close(held, "stopped")
    code, lines = work(study, "finish()")
    assert code == 0
    assert "this machine's clock is 3600 s ahead of that of" in lines[0]
