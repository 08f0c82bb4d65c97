"""A whole study in a bucket: two workers of `launch.sweep`, one of which is killed, and `launch.status`."""

import collections
import os
import sys

from launch import status, sweep, worker
from launch.engines import local
from lowrank.core import paths
from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.folder import read_folder

STUDY = """
from configs import tiny
from lowrank.sweeps.axes import axis
from lowrank.sweeps.study import Limits, Study
def get_study(arg=None):
    return Study("ranks", tiny.get_config(), axis("method.rank", [1, 2, 3]), limits=Limits(lease=5.0))
"""
# In place of a training run, whose own folder in a bucket has its tests. The first one kills its worker.
CELL = """
import os, pathlib, signal, sys, time
import fsspec
notes, run, key = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(notes, "a") as file:
    file.write(key + "\\n")
try:
    os.close(os.open(notes.with_suffix(".killed"), os.O_CREAT | os.O_EXCL))
except FileExistsError:
    fsspec.filesystem("gcs").pipe_file(run + "/summary.json", b'{"final_loss": 1.5, "seconds": 2.0}')
else:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""
WORKER = """
import sys
from lowrank.core.paths import as_path
from lowrank.sweeps.folder import read_folder
from lowrank.sweeps.worker import Worker
folder, cell, notes = sys.argv[1:4]  # the engine adds its flags
run = lambda study, of: [sys.executable, "-c", cell, notes, str(study.run_path(of.key)), of.key]
sys.exit(Worker(read_folder(as_path(folder)), run, poll=0.05).run())
"""


def test_a_killed_worker_loses_no_cell_and_none_counts_twice(files, bucket, tmp_path, monkeypatch, capsys):
    (tmp_path / "study.py").write_text(STUDY)
    url, notes = f"{bucket}/{tmp_path.name}", tmp_path / "notes.txt"
    words = [sys.executable, "-c", WORKER, url, CELL, str(notes)]
    monkeypatch.setattr(worker, "worker_command", lambda folder: words if str(folder) == url else [])
    monkeypatch.setattr(sweep, "_run_planner", lambda argv, target: sweep.main([sweep.PLANNER, *argv]))
    monkeypatch.setattr(local, "POLL", 0.1)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    changes = [f"--config.model.name={files / 'llama'}", f"--config.data.source=jsonl:{files / 'records.jsonl'}"]
    argv = [f"--study={tmp_path / 'study.py'}", f"--folder={url}", "--workers=2", *changes]
    assert sweep.main(argv) == 0
    assert "ranks: 3 cells, 3 done" in capsys.readouterr().out

    study = read_folder(paths.as_path(url))
    histories = Ledger(study.path, study.limits).histories([cell.key for cell in study.cells])
    started = collections.Counter(notes.read_text().split())
    assert set(started) == set(histories)
    killed = notes.read_text().split()[0]
    assert started[killed] >= 2
    for history in histories.values():
        states = [event["state"] for event in history.events]
        assert states.count("done") == 1
        assert states[-1] == "done"
    assert histories[killed].stops >= 1
    assert paths.exists(study.log_path(killed, len(histories[killed].events) - 1))

    assert status.main([url, f"--tables={url}/shown"]) == 0
    assert "ranks: 3 cells, 3 done" in capsys.readouterr().out
    table = paths.read_text(f"{url}/shown/table.csv")
    assert table == paths.read_text(f"{url}/table.csv")
    assert [line.split(",")[:3] for line in table.splitlines()[1:]] == [[rank, "1", "1"] for rank in "123"]
    assert {path.name for path in paths.children(f"{url}/shown/hparams")} > set(histories)
