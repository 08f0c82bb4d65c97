"""Studies whose cells are small scripts in place of training runs, and workers on them as processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from configs import tiny
from lowrank.sweeps.axes import seeds
from lowrank.sweeps.folder import open_study
from lowrank.sweeps.study import Limits, Study

# The cell's script gets its run folder, its key and its seed. `note` adds to a list of all that the cells did.
HEAD = """
import json, os, pathlib, signal, sys, time
folder, key, seed = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
def note(word):
    with open(folder.parent / "notes.txt", "a") as notes:
        notes.write(f"{word} {key}\\n")
def finish(**summary):
    (folder / "summary.json").write_text(json.dumps(dict(final_loss=seed / 10, **summary)))
    note("done")
note("start")
"""


def make_study(count=3, **settings):
    """A study of `count` seeds on the tiny config."""
    limits = {"lease": 2.0, "stall": 0.0, **settings.pop("limits", {})}
    settings = {"points": seeds(count), **settings}
    return Study("dummy", tiny.get_config(), limits=Limits(**limits), **settings)


def make_folder(path: Path, count=3, **settings):
    """The folder of `make_study`."""
    return open_study(make_study(count, **settings), path)


def command(script: str):
    """A worker's command that runs `script` for a cell."""
    return lambda study, cell: [
        *(sys.executable, "-c", HEAD + textwrap.dedent(script)),
        *(str(study.run_path(cell.key)), cell.key, str(cell.config["seed"])),
    ]


def worker_words(folder: Path, script: str, **options) -> list[str]:
    """The command of a worker on the study in `folder`; `options` are those of `Worker`."""
    code = f"""
        import pathlib, sys
        from lowrank.sweeps.folder import read_folder
        from lowrank.sweeps.worker import Worker
        from tests.support import dummy_cells
        study = read_folder(pathlib.Path({str(folder)!r}))
        command = dummy_cells.command({script!r})
        sys.exit(Worker(study, command, poll=0.02, **{options!r}).run())
    """
    return [sys.executable, "-c", textwrap.dedent(code)]


def start_worker(folder: Path, script: str, **options) -> subprocess.Popen:
    """A process that is such a worker."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(worker_words(folder, script, **options), env=environment, stdout=subprocess.DEVNULL)


def notes(folder: Path) -> list[str]:
    """What the cells did, one `WORD KEY` each."""
    path = folder / "runs" / "notes.txt"
    return path.read_text().splitlines() if path.exists() else []
