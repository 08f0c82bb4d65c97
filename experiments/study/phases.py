"""What a row still needs, and the runs that fill it: the sweep, the seeds at its best rate, the timing."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.study.cells import Cell
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.timing import Timing


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
