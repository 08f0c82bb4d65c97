"""Runs a study: every cell that is missing, with progress; the table after each row."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from absl import flags
from tqdm import tqdm

from experiments.study.cells import PHASES, Row, Study, left, named, planned
from experiments.study.tasks import TASKS, Model, Task
from lowrank import pretrained, workdir
from lowrank.errors import UserError, unknown

_QUICK = flags.DEFINE_bool("quick", False, "Two steps, one learning rate, one seed, a few examples, in runs/.")
_TASK = flags.DEFINE_list("task", list(TASKS), "The tasks to run.")
_ROWS = flags.DEFINE_list("rows", None, "The rows to run; by default all.")
_PHASES = flags.DEFINE_list("phases", list(PHASES), "What to run: scores, timing; nothing only rewrites the table.")
_RESULTS = flags.DEFINE_string("results", "", "Where cells and table go; by default beside the study.")


def main(name: str, write: Callable[[Study], None]) -> None:
    """Runs the study `experiments/NAME` as the flags say; `write` makes its table from the cells there are."""
    try:
        study = named(name, _QUICK.value, _RESULTS.value)
        run(study, write, _TASK.value, _ROWS.value or list(study.rows), [p for p in _PHASES.value if p])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    print((study.results / "table.md").read_text())


def run(
    study: Study,
    write: Callable[[Study], None],
    tasks: Sequence[str],
    names: Sequence[str],
    phases: Sequence[str] = tuple(PHASES),
) -> None:
    """Fills the missing cells of `tasks` x `names` and writes the table. Raises UserError for an unknown name."""
    for kind, known, wanted in (("task", TASKS, tasks), ("row", study.rows, names), ("phase", PHASES, phases)):
        for name in wanted:
            if name not in known:
                raise unknown(kind, name, known)
    jobs = [(phase, *pair) for phase in phases for pair in planned(study, tasks, names)]
    todo = {job: left(study, job[0], TASKS[job[1]], job[2]) for job in jobs}
    with tqdm(unit="run", smoothing=0.05) as bar:
        for phase, task, name in jobs:
            bar.total = bar.n + sum(todo.values())
            bar.set_description(f"{task}/{name}")
            if todo[phase, task, name]:
                _row(study, phase, task, name, bar)
                todo[phase, task, name] = left(study, phase, TASKS[task], name)
                write(study)
    write(study)


def _row(study: Study, phase: str, task: str, name: str, bar: tqdm) -> None:
    """One row in a process of its own."""
    command = [sys.executable, "-m", "experiments.study.row", study.name, phase, task, name, str(study.results)]
    log = study.runs / task / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as said:
        process = subprocess.Popen(command + ["quick"] * study.quick, stdout=subprocess.PIPE, stderr=said, text=True)
        for line in process.stdout:
            bar.update()
            bar.write(f"{time.strftime('%H:%M:%S')} {task}/{name} {line.strip()}")
    if process.wait():
        bar.write(f"{task}/{name} failed, see {log}: {log.read_text().strip().splitlines()[-1:]}")


def untrained(study: Study, task: Task) -> dict[str, float]:
    """What the untrained model scores and knows: `{known, ...}`; kept beside the cells."""
    path = study.results / "cells" / task.name / "untrained.json"
    config = task.config(Row("", {"name": "full"}, ()), 0.0, 0, study.quick)
    if not path.exists():
        model = Model(config, pretrained.load(config.model.name), None)
        workdir.write_json(path, {"known": task.known(model)})
    return json.loads(path.read_text())
