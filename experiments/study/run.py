"""Runs a study: every cell that is missing, with progress; the table after each row."""

import functools
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.study.compute_cost import cores
from experiments.study.stages import PHASES, left, planned
from experiments.study.study import Row, Study, kept, named
from experiments.study.tasks import TASKS, Model, Task
from lowrank import pretrained
from lowrank.core import files
from lowrank.core.errors import UserError, unknown

_QUICK = flags.DEFINE_bool("quick", False, "Two steps, one learning rate, one seed, a few examples, in runs/.")
_TASK = flags.DEFINE_list("task", list(TASKS), "The tasks to run.")
_ROWS = flags.DEFINE_list("rows", None, "The rows to run; by default all.")
_PHASES = flags.DEFINE_list("phases", list(PHASES), "What to run: scores, timing; nothing only rewrites the table.")
_RESULTS = flags.DEFINE_string("results", "", "Where cells and table go; by default beside the study.")
_WORKERS = flags.DEFINE_integer(
    "workers", 2, "Rows that are scored at once, each on its share of the cores; 1 where they share an accelerator.", 1
)


def main(name: str, write: Callable[[Study], None]) -> None:
    """Runs the study `experiments/NAME` as the flags say; `write` makes its table from the cells there are."""
    try:
        study = named(name, _QUICK.value, _RESULTS.value)
        phases = [p for p in _PHASES.value if p]
        run(study, write, _TASK.value, _ROWS.value or list(study.rows), phases, _WORKERS.value)
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
    workers: int = 1,
) -> None:
    """Fills the missing cells of `tasks` x `names` and writes the table. Raises UserError for an unknown name.

    Scores are of `workers` rows at a time; a row that is timed has the machine to itself. The last rows go first:
    those on larger models stand there, and a long one at the end would leave the other cores idle.
    """
    asked = (("task", TASKS, [*tasks, *study.settings]), ("row", study.rows, names), ("phase", PHASES, phases))
    for kind, known, wanted in asked:
        for name in wanted:
            if name not in known:
                raise unknown(kind, name, known)
    jobs = [(phase, *pair) for phase in phases for pair in planned(study, tasks, names)]
    todo = {job: left(study, job[0], TASKS[job[1]], job[2]) for job in jobs}
    with tqdm(unit="run", smoothing=0.05, total=sum(todo.values())) as bar:
        for phase in phases:
            shares = _shares(1 if phase == "timing" else workers)
            with ThreadPoolExecutor(len(shares.queue)) as pool:
                fill = functools.partial(_fill, study, write, todo, bar, shares, threading.Lock())
                list(pool.map(fill, [job for job in reversed(jobs) if job[0] == phase and todo[job]]))
    write(study)


def _shares(workers: int) -> queue.Queue:
    """The cores of the machine in `workers` parts, as `taskset` names them; at most as many as there are cores."""
    shares, all_cores = queue.Queue(), cores()
    for part in np.array_split(all_cores, min(workers, len(all_cores))):
        shares.put(",".join(map(str, part)))
    return shares


def _fill(study, write, todo, bar, shares, lock, job) -> None:
    """One row on a free share of the cores, and the table after it."""
    phase, task, name = job
    cores = shares.get()
    try:
        _row(study, phase, task, name, bar, cores)
    finally:
        shares.put(cores)
    with lock:
        todo[job] = left(study, phase, TASKS[task], name)
        bar.total = bar.n + sum(todo.values())
        write(study)


def _row(study: Study, phase: str, task: str, name: str, bar: tqdm, cores: str) -> None:
    """One row in a process of its own, on these cores."""
    pinned = ["taskset", "-c", cores] if shutil.which("taskset") else []
    command = [*pinned, sys.executable, "-m", "experiments.study.worker", study.name, phase, task, name]
    log = study.runs / task / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as said:
        argv = [*command, str(study.results), *["quick"] * study.quick]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=said, text=True)
        for line in process.stdout:
            bar.set_description(f"{task}/{name}", refresh=False)
            bar.update()
            bar.write(f"{time.strftime('%H:%M:%S')} {task}/{name} {line.strip()}")
    if process.wait():
        bar.write(f"{task}/{name} failed, see {log}: {log.read_text().strip().splitlines()[-1:]}")


def untrained(study: Study, task: Task) -> dict[str, Any]:
    """What the untrained model knows: `{known, config}`; kept beside the cells."""
    path = study.results / "cells" / task.name / "untrained.json"
    config = study.config(task, Row("", {"name": "full"}, ()), 0.0, 0)
    if not (found := kept(path, config)):
        model = Model(config, pretrained.load(config.model.name), None)
        found = {"config": files.to_json(config), "known": task.known(model)}
        files.write_json(path, found)
    return found
