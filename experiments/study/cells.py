"""The cells of a study: one row at one learning rate on one seed. They are files, so a killed study goes on."""

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.study.tasks import Model, Task
from lowrank import merging, methods, train, workdir
from lowrank.adapter import ABOUT
from lowrank.runlog import LOSS, METRICS, read_metrics

SEEDS = (0, 1, 2)
TIMED = 8  # steps


class Row(NamedTuple):
    """What is compared: a method, on a base as `model` says, at the learning rates of the sweep."""

    family: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]
    tasks: tuple[str, ...] = ("topics",)
    model: Mapping[str, Any] = MappingProxyType({})  # beside the task's own options of the model
    optim: Mapping[str, Any] = MappingProxyType({})  # and of the optimizer


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder of `experiments`: its rows, and where cells are kept and runs take place.

    `quick` is one rate, one seed, two steps. `forgetting`: what a tuned model still knows is scored, too.
    """

    name: str
    rows: Mapping[str, Row]
    results: Path
    runs: Path
    quick: bool = False
    forgetting: bool = True

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the table."""
        return SEEDS[:1] if self.quick else SEEDS


def named(name: str, quick: bool = False, results: str = "") -> Study:
    """The study `experiments/NAME`; a quick one keeps its cells in `runs/`."""
    runs = Path("runs") / (f"{name}-quick" if quick else name)
    here = runs / "results" if quick else Path(__file__).parents[1] / name / "results"
    module = importlib.import_module(f"experiments.{name}.rows")
    return Study(name, module.ROWS, Path(results) if results else here, runs, quick, module.FORGETTING)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the study."""

    study: Study
    task: Task
    name: str
    lr: float
    seed: int

    @property
    def row(self) -> Row:
        """What it is a run of."""
        return self.study.rows[self.name]

    @property
    def path(self) -> Path:
        """The file of its numbers."""
        return self.study.results / "cells" / self.task.name / self.name / f"lr{self.lr:g}-seed{self.seed}.json"

    @property
    def config(self) -> Any:
        """Its run."""
        return self.task.config(self.row, self.lr, self.seed, self.study.quick)

    def read(self) -> dict[str, Any] | None:
        """Its numbers; None when there are none, or they are of another config than it has now."""
        return kept(self.path, self.config)

    def run(self) -> dict[str, Any]:
        """Trains, and keeps the numbers."""
        summary = train.run(self.config, self.folder, before=False)
        numbers = {
            "config": workdir.plain(self.config),
            "validation": summary["after"][self.task.metric],
            "trained_params": summary["trained_params"],
            "adapter_kb": _size(self.folder / train.ADAPTER) / 2**10,
            "seconds": summary["seconds"],
        }
        workdir.write_json(self.path, numbers)
        return numbers

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return self.study.runs / self.task.name / self.name / f"lr{self.lr:g}-seed{self.seed}"

    def judge(self) -> dict[str, Any]:
        """Its numbers with the test score, and what the saved adapter's model still knows; trains if it must."""
        numbers = self.read()
        if numbers and "test" in numbers:
            return numbers
        if not numbers or not (self.folder / train.ADAPTER).exists():
            numbers = self.run()
        options = dict(self.config.model)
        name, dtype = options.pop("name"), options.pop("param_dtype", "float32")
        options = {k: v for k, v in options.items() if k not in ("quantize", "upcycle")}  # an adapter knows its base
        base = merging.adapted(self.folder / train.ADAPTER, name, model=options, param_dtype=dtype)
        model = Model(self.config, base, methods.build(self.row.method).bind)
        numbers["test"] = model.score("test")[self.task.metric]
        if self.study.forgetting:
            numbers["known"] = self.task.known(model)
        workdir.write_json(self.path, numbers)
        shutil.rmtree(self.folder)
        return numbers


@dataclasses.dataclass(frozen=True)
class Timing:
    """A short run of one method, in a process of its own, that is only timed."""

    study: Study
    task: Task
    name: str

    @property
    def path(self) -> Path:
        """The file of its numbers."""
        return self.study.results / "cells" / self.task.name / self.name / "timing.json"

    @property
    def config(self) -> Any:
        """A few steps, each logged, without evaluation."""
        row = self.study.rows[self.name]
        config = self.task.config(row, row.rates[0], 0, self.study.quick)
        config.steps, config.eval, config.log_every = 3 if self.study.quick else TIMED, {}, 1
        return config

    def read(self) -> dict[str, Any] | None:
        """Its numbers; None when there are none, or they are of another config than it has now."""
        return kept(self.path, self.config)

    def run(self) -> dict[str, Any]:
        """Trains, and keeps the median time of a step and the peak of the process."""
        folder = self.study.runs / self.task.name / f"{self.name}-timing"
        summary = train.run(self.config, folder)
        numbers = {
            "config": workdir.plain(self.config),
            "step_s": step_seconds(folder),
            "peak_mb": summary["peak_host_bytes"] / 2**20,
            "load": os.getloadavg()[0],
        }
        workdir.write_json(self.path, numbers)
        shutil.rmtree(folder)
        return numbers


def kept(path: Path, config: Any) -> dict[str, Any] | None:
    """The numbers in a file; None when there are none, or they are of another config."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("config") == workdir.plain(config) else None


def step_seconds(folder: Path) -> float:
    """The median time between the losses of two successive steps, all of which are logged."""
    times = [line["seconds"] for line in read_metrics(folder / METRICS) if LOSS in line]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.name != ABOUT)


def sweep(study: Study, task: Task, name: str) -> list[Cell]:
    """The cells that choose the learning rate: every rate on the first seed."""
    rates = study.rows[name].rates
    rates = rates[len(rates) // 2 :][:1] if study.quick else rates
    return [Cell(study, task, name, lr, study.seeds[0]) for lr in rates]


def best(cells: list[Cell]) -> Cell | None:
    """The cell with the best score on validation; None while one is missing."""
    scored = [(cell, cell.read()) for cell in cells]
    if any(numbers is None for _, numbers in scored):
        return None
    return max(scored, key=lambda pair: pair[0].task.sign * pair[1]["validation"])[0]


def finals(study: Study, task: Task, name: str) -> list[Cell]:
    """The cells of the table: the best rate on every seed; none before the sweep is done."""
    chosen = best(sweep(study, task, name))
    return [dataclasses.replace(chosen, seed=seed) for seed in study.seeds] if chosen else []


def scores(study: Study, task: Task, name: str) -> Iterator[Cell]:
    """Runs what is missing of a row's scores, cell by cell; yields each when it is done."""
    for cell in sweep(study, task, name):
        if cell.read() is None:
            cell.run()
            yield cell
    for cell in finals(study, task, name):
        if "test" not in (cell.read() or {}):
            cell.judge()
            yield cell
    shutil.rmtree(study.runs / task.name / name, ignore_errors=True)


def timing(study: Study, task: Task, name: str) -> Iterator[Timing]:
    """Runs the timing of a row if it is missing."""
    cell = Timing(study, task, name)
    if cell.read() is None:
        cell.run()
        yield cell


PHASES: dict[str, Callable[[Study, Task, str], Iterator[Any]]] = {"scores": scores, "timing": timing}


def left(study: Study, phase: str, task: Task, name: str) -> int:
    """How many runs the row still needs, at most."""
    if phase == "timing":
        return int(Timing(study, task, name).read() is None)
    cells, chosen = sweep(study, task, name), finals(study, task, name)
    if not chosen:
        return sum(cell.read() is None for cell in cells) + len(study.seeds) - 1
    return sum("test" not in (cell.read() or {}) for cell in chosen)


def planned(study: Study, tasks: Sequence[str], rows: Sequence[str]) -> list[tuple[str, str]]:
    """`(task, row)` for every pair that the study has."""
    return [(task, name) for task in tasks for name in rows if task in study.rows[name].tasks]
