"""The command of a study: it runs every missing cell, shows progress, and writes the table after each row."""

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
from experiments.study.stages import PHASES, missing_runs, task_row_pairs
from experiments.study.study import Row, Study, load_study, read_numbers
from experiments.study.tasks import TASKS, Model, Task
from lowrank import pretrained
from lowrank.core import files
from lowrank.core.errors import UserError, unknown

_QUICK = flags.DEFINE_bool("quick", False, "Two steps, one learning rate, one seed, a few examples, in runs/.")
_TASK = flags.DEFINE_list("task", list(TASKS), "The tasks to run.")
_ROWS = flags.DEFINE_list("rows", None, "The rows to run; by default all.")
_PHASES = flags.DEFINE_list("phases", list(PHASES), "What to run: scores, timing; nothing only rewrites the table.")
_RENEW = flags.DEFINE_bool("renew", False, "Run the scores again that are of earlier formulas than their row's.")
_RESULTS = flags.DEFINE_string("results", "", "Where cells and table go; by default beside the study.")
_WORKERS = flags.DEFINE_integer(
    "workers", 2, "Rows that are scored at once, each on its share of the cores; 1 where they share an accelerator.", 1
)


def main(name: str, write: Callable[[Study], None]) -> None:
    """Runs the study `experiments/NAME` with the flags' settings; `write` writes its table from the finished cells."""
    try:
        study = load_study(name, _QUICK.value, _RESULTS.value, _RENEW.value)
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

    The scores of `workers` rows are computed at a time; the timing of a row has the machine to itself. The last rows
    run first: they use larger models, and a long run at the end would leave the other cores idle.
    """
    asked = (("task", TASKS, [*tasks, *study.settings]), ("row", study.rows, names), ("phase", PHASES, phases))
    for kind, known, wanted in asked:
        for name in wanted:
            if name not in known:
                raise unknown(kind, name, known)
    row_runs = [(phase, *pair) for phase in phases for pair in task_row_pairs(study, tasks, names)]
    missing = {row_run: missing_runs(study, row_run[0], TASKS[row_run[1]], row_run[2]) for row_run in row_runs}
    with tqdm(unit="run", smoothing=0.05, total=sum(missing.values())) as bar:
        for phase in phases:
            shares = _shares(1 if phase == "timing" else workers)
            with ThreadPoolExecutor(len(shares.queue)) as pool:
                fill = functools.partial(_fill, study, write, missing, bar, shares, threading.Lock())
                list(
                    pool.map(
                        fill, [row_run for row_run in reversed(row_runs) if row_run[0] == phase and missing[row_run]]
                    )
                )
    write(study)


def _shares(workers: int) -> queue.Queue:
    """The cores of the machine in `workers` parts, or one part per core if there are fewer, in `taskset`'s notation."""
    shares, all_cores = queue.Queue(), cores()
    for part in np.array_split(all_cores, min(workers, len(all_cores))):
        shares.put(",".join(map(str, part)))
    return shares


def _fill(study, write, missing, bar, shares, lock, row_run) -> None:
    """Runs one row on a free share of the cores, then writes the table."""
    phase, task, name = row_run
    cores = shares.get()
    try:
        _row(study, phase, task, name, bar, cores)
    finally:
        shares.put(cores)
    with lock:
        missing[row_run] = missing_runs(study, phase, TASKS[task], name)
        bar.total = bar.n + sum(missing.values())
        write(study)


def _row(study: Study, phase: str, task: str, name: str, bar: tqdm, cores: str) -> None:
    """Runs one row in its own process, on these cores."""
    pinned = ["taskset", "-c", cores] if shutil.which("taskset") else []
    command = [*pinned, sys.executable, "-m", "experiments.study.worker", study.name, phase, task, name]
    log = study.runs / task / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as said:
        argv = [*command, str(study.results), *["quick"] * study.quick, *["renew"] * study.renew]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=said, text=True)
        for line in process.stdout:
            bar.set_description(f"{task}/{name}", refresh=False)
            bar.update()
            bar.write(f"{time.strftime('%H:%M:%S')} {task}/{name} {line.strip()}")
    if process.wait():
        bar.write(f"{task}/{name} failed, see {log}: {log.read_text().strip().splitlines()[-1:]}")


def untrained(study: Study, task: Task) -> dict[str, Any]:
    """The untrained model's score on its pretraining task, `{known, config}`, which is stored beside the cells."""
    path = study.results / "cells" / task.name / "untrained.json"
    config = study.config(task, Row("", {"name": "full"}, ()), 0.0, 0)
    if not (found := read_numbers(path, config)):
        model = Model(config, pretrained.load(config.model.name), None)
        found = {"config": files.to_json(config), "known": task.known(model)}
        files.write_json(path, found)
    return found
