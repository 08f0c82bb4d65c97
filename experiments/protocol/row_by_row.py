"""Runs a study one row at a time: `python -m experiments.NAME [--task=T] [--rows=a,b] [--size=small] [...]`.

    --task=T         the task to run; by default all of them, one after another
    --rows=a,b       the rows to run; by default all of the task's
    --size=small     ci (two steps, to see that all works) or small (real weights and text)
    --workers=1      processes that run a row's cells side by side on this machine; 0: write the tables of what is done
    --folder=DIR     the folder of the sweeps; by default runs/NAME/SIZE
    --results=DIR    where tables and plots go; by default experiments/NAME/results for `small`, else in runs/
    --config.a.b=c   changes the config of every run

A row searches its learning rate on two seeds, is trained on five others, and its runs go into `cells.csv` among the
results; then the tables are written, and the folder of its sweeps is deleted. A row whose runs are all in the file is
not run again, so that a study may take several days and machines: the same command continues it. To run a row again,
delete its lines. The exit code is that of `launch.sweep`.
"""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.protocol import command as study_command
from experiments.protocol.experiment import FINAL, RATES, RATES_FILE, Experiment, Row
from experiments.protocol.measures import load_model, measured
from experiments.protocol.model import Model
from experiments.protocol.rates import rate_line
from experiments.protocol.record import ENDED, Line, Record, line_of, numbers
from experiments.protocol.table import as_number
from launch import command, sweep
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import as_local_path
from lowrank.sweeps.cells import cell_key
from lowrank.sweeps.folder import StudyFolder, read_folder
from lowrank.sweeps.results import Result
from lowrank.sweeps.status import Status
from lowrank.sweeps.study import Study
from lowrank.sweeps.tables import write_csv

UNTRAINED = "untrained"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of such a study."""

    experiment: Experiment
    known: Callable[[Model], float] | None = None  # a score on what a model knew before, of the untrained one too
    right: Callable[[Model, str], Sequence[bool]] | None = None  # whether each answer on a split is right
    prepare: Callable[["Runs", Row], None] | None = None  # comes before the runs of a row

    def measure(self, model: Model) -> dict[str, Any]:
        """Further columns of `cells.csv` for a trained model."""
        known = {"known": self.known(model)} if self.known else {}
        answers = self.right(model, model.run.eval.split) if self.right else ()
        return known | ({"right": "".join(str(int(each)) for each in answers)} if self.right else {})


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of a task in a size: which there are, and which of them are recorded."""

    task: Task
    size: str
    record: Record
    changes: Sequence[str] = ()  # of the config of every run

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of the size."""
        return self.task.experiment.size(self.size).rows

    def rates(self, row: Row) -> Study | None:
        """The sweep that chooses a row's learning rate; None if there is no choice."""
        size = self.task.experiment.size(self.size)
        if len(size.rates_of(row)) == 1:
            return None
        return sweep.with_words(self.task.experiment.get_study(f"{self.size},{RATES},,{row.name}"), self.changes)

    def rate(self, row: Row) -> dict[str, Any] | None:
        """The line of `rates.csv` of a row; None while its search is not recorded, and if every rate diverged."""
        size, study, experiment = self.task.experiment.size(self.size), self.rates(row), self.task.experiment
        if study is None:
            return rate_line(size, row, [(size.rates_of(row)[0], 0.0)], experiment.metric, "max")
        lines = self.find(study)
        scores = [(float(line["lr"]), as_number(line["score"])) for line in lines]
        if all(math.isnan(score) for _, score in scores):
            return None
        return rate_line(size, row, scores, experiment.metric, study.better())

    def final(self, row: Row) -> Study | None:
        """The sweep of a row at its best rate; None while its search is not recorded."""
        if (rate := self.rate(row)) is None:
            return None
        experiment = self.task.experiment
        return sweep.with_words(experiment.final_study(self.size, row.name, rate["lr"]), self.changes)

    def scored(self, row: Row) -> list[Line]:
        """The recorded runs of a row's final phase; an empty list while one is missing."""
        study = self.final(row)
        return self.find(study) if study else []

    def all_scored(self) -> dict[str, list[Line]]:
        """`{row: runs of its final phase}` of the rows that are recorded and have a score, in their order."""
        found = {row.name: self.scored(row) for row in self.rows}
        return {name: lines for name, lines in found.items() if numbers(lines, "score")}

    def find(self, study: Study) -> list[Line]:
        """The recorded runs of a sweep; an empty list while one is missing."""
        return self.record.find([cell.key for cell in study.cells()])

    def known(self) -> float:
        """What the untrained model knows; NaN for a task without such a score, and before it is recorded."""
        found = self.record.find([cell_key(self._untrained_config())])
        return as_number(found[0]["known"]) if found else math.nan

    def config(self, row: Row) -> Mapping[str, Any]:
        """The config of a row's first run in the final phase, at a rate of 0."""
        study = self.task.experiment.final_study(self.size, row.name, 0.0)
        return sweep.with_words(study, self.changes).cells()[0].config

    def _untrained_config(self) -> dict[str, Any]:
        """The config of a run that attaches nothing and takes no step."""
        return {**self.config(self.rows[0]), "method": {"name": "full"}, "steps": 0}

    def measure_untrained(self) -> None:
        """Records what the untrained model knows, unless that is not asked for or recorded."""
        if self.task.known and math.isnan(self.known()):
            config = self._untrained_config()
            line = {"lr": 0.0, "seed": 0, "key": cell_key(config), "known": self.task.known(load_model(config))}
            self.record.add([self._place(line, UNTRAINED, UNTRAINED)])

    def keep(self, row: Row, phase: str, status: Status, workers: int) -> None:
        """Records the runs of a sweep that has ended."""
        lines = [self._line(status.study, result, phase, workers) for result in status.results]
        self.record.add([self._place(line, row.name, phase) for line in lines])

    def _line(self, study: StudyFolder, result: Result, phase: str, workers: int) -> dict[str, Any]:
        line = line_of(study, result, workers)
        if phase == FINAL and result.summary and (self.task.known or self.task.right):
            line |= measured(study, result.cell, self.task.measure)
        return line

    def _place(self, line: Mapping[str, Any], row: str, phase: str) -> dict[str, Any]:
        return {"task": self.task.experiment.task, "row": row, "phase": phase, **line}


Write = Callable[[Mapping[str, Runs], Path], Any]  # (runs by task, results) -> the tables and plots, and their text


def main(name: str, tasks: Mapping[str, Task], write: Write, argv: Sequence[str]) -> int:
    """Runs the command of a study; returns the exit code."""
    try:
        text = f"{next(iter(tasks.values())).experiment.question}\n\n{__doc__}"
        args, changes = study_command.parse(name, text, argv, "--task", "--rows")
        if args.task and args.task not in tasks:
            raise unknown("task", args.task, tasks)
        first = next(iter(tasks.values())).experiment
        results = as_local_path(args.results or first.results(args.size))
        folder = as_local_path(args.folder or f"runs/{name}/{args.size}")
        record = Record(results)
        runs = {key: Runs(task, args.size, record, changes) for key, task in tasks.items()}
        codes = [0]
        for key, row in _asked(runs, [args.task] if args.task else list(tasks), args.rows) if args.workers else ():
            code = _run_row(runs[key], row, folder / key / row.name, args.workers)
            if code not in (0, 1):
                return code
            codes.append(code)
            write(runs, results)
        print(write(runs, results))
        return max(codes)
    except (OSError, UserError) as e:
        return command.print_error(e)


def _asked(runs: Mapping[str, Runs], tasks: Sequence[str], names: str) -> Iterator[tuple[str, Row]]:
    """`(task, row)` of all that is to be run. Raises UserError for a row that none of the tasks has."""
    wanted = names.split(",") if names else []
    known = {row.name for task in tasks for row in runs[task].rows}
    for name in wanted:
        if name not in known:
            raise unknown("row", name, known)
    return ((task, row) for task in tasks for row in runs[task].rows if not wanted or row.name in wanted)


def _run_row(runs: Runs, row: Row, folder: Path, workers: int) -> int:
    """Runs what a row lacks; returns 0 if all of it is recorded, and else the exit code of the sweep that has ended."""
    if runs.task.prepare:
        runs.task.prepare(runs, row)
    for phase, study in ((RATES, runs.rates), (FINAL, runs.final)):
        wanted = study(row)
        if wanted is None or runs.find(wanted):
            continue
        if phase == FINAL:
            runs.measure_untrained()
            rate = runs.rate(row)
            write_csv(folder / RATES_FILE, list(rate), [rate])
        spec = f"--study={runs.task.experiment.file()}:{runs.size},{phase},{folder},{row.name}"
        code = sweep.main([spec, f"--folder={folder / phase}", f"--workers={workers}", *runs.changes])
        if code not in (0, 1):
            return code
        status = Status(read_folder(folder / phase))
        if any(result.state not in ENDED for result in status.results):
            print(f"{status.headline()}: look into {folder / phase / 'logs'}")
            return 1
        runs.keep(row, phase, status, workers)
    if not runs.scored(row):
        print(f"{row.name}: no learning rate gave a score, lower its rates")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0
