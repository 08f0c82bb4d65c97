"""Compares all methods on two tasks: `python -m experiments.methods [--quick] [--task=T] [--rows=a,b] [--phases=p]`.

Runs every cell that is not there yet, first those for scores, then those for timing, which want an idle machine; shows
progress, and rewrites the table and the plot. Kill it and start it again: cells that are done stay. `--quick` is two
steps, one rate, one seed, in `runs/`; `--phases=` runs nothing and rewrites the table.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from tqdm import tqdm

from experiments.methods import table
from experiments.methods.catalogue import catalogue
from experiments.methods.cells import PHASES, Study, left, planned
from experiments.methods.rows import ROWS
from experiments.methods.tasks import TASKS, Model, Task
from lowrank import pretrained, workdir
from lowrank.errors import UserError, unknown

_QUICK = flags.DEFINE_bool("quick", False, "Two steps, one learning rate, one seed, a few examples.")
_TASK = flags.DEFINE_list("task", list(TASKS), "The tasks to run.")
_ROWS = flags.DEFINE_list("rows", list(ROWS), "The methods to run.")
_PHASES = flags.DEFINE_list("phases", list(PHASES), "What to run: scores, timing.")
_RESULTS = flags.DEFINE_string("results", "", "Where cells and table go; by default beside this file.")


def run(study: Study, tasks: Sequence[str], names: Sequence[str], phases: Sequence[str] = tuple(PHASES)) -> None:
    """Fills the missing cells of `tasks` x `names` and writes the table. Raises UserError for an unknown name."""
    for kind, known, wanted in (("task", TASKS, tasks), ("row", ROWS, names), ("phase", PHASES, phases)):
        for name in wanted:
            if name not in known:
                raise unknown(kind, name, known)
    jobs = [(phase, *pair) for phase in phases for pair in planned(list(tasks), list(names))]
    with tqdm(unit="run", smoothing=0.05) as bar:
        for phase, task, name in jobs:
            bar.total = bar.n + sum(left(study, p, TASKS[t], n) for p, t, n in jobs)
            bar.set_description(f"{task}/{name}")
            if left(study, phase, TASKS[task], name):
                _row(study, phase, task, name, bar)
                table.write(study, rows(study))
    table.write(study, rows(study))
    if not study.quick:
        workdir.write_json(study.results / "catalogue.json", catalogue())


def rows(study: Study) -> list[dict]:
    """The table's rows, from the cells there are."""
    return table.rows(study, lambda task: _known(study, task))


def _row(study: Study, phase: str, task: str, name: str, bar: tqdm) -> None:
    """One row in a process of its own."""
    command = [sys.executable, "-m", "experiments.methods.row", phase, task, name, str(study.results), str(study.runs)]
    log = study.runs / task / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as said:
        process = subprocess.Popen(command + ["quick"] * study.quick, stdout=subprocess.PIPE, stderr=said, text=True)
        for line in process.stdout:
            bar.update()
            bar.write(f"{time.strftime('%H:%M:%S')} {task}/{name} {line.strip()}")
    if process.wait():
        bar.write(f"{task}/{name} failed, see {log}: {log.read_text().strip().splitlines()[-1:]}")


def _known(study: Study, task: Task) -> float:
    """What the untrained model knows of the task it was pretrained for; kept beside the cells."""
    path, config = (
        study.results / "cells" / task.name / "untrained.json",
        task.config({"name": "full"}, 0.0, 0, study.quick),
    )
    if not path.exists():
        model = Model(config, pretrained.load(config.model.name), None)
        workdir.write_json(path, {"known": task.known(model)})
    return json.loads(path.read_text())["known"]


def main(argv: Sequence[str]) -> None:
    """Runs the study as the flags say."""
    del argv
    here = Path("runs/methods-quick/results") if _QUICK.value else Path(__file__).parent / "results"
    study = Study(
        Path(_RESULTS.value or here), Path("runs/methods-quick" if _QUICK.value else "runs/methods"), _QUICK.value
    )
    try:
        run(study, _TASK.value, _ROWS.value, _PHASES.value)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    print((study.results / "table.md").read_text())


if __name__ == "__main__":
    app.run(main)
