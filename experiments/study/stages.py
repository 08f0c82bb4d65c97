"""The stages of a row: the sweep of learning rates, the seeds at the best rate, and the timing."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.study.study import GRID, Study
from experiments.study.tasks import Task
from experiments.study.timing import Timing
from experiments.study.trials import Cell


def sweep(study: Study, task: Task, name: str) -> list[Cell]:
    """The cells that choose the learning rate, on the first seed; of a search, the cells that are known so far."""
    rates = study.rows[name].rates
    cells = [Cell(study, task, name, lr, study.seeds[0]) for lr in (rates[:1] if study.quick else rates)]
    while study.search and (found := best(cells)) and (rate := _beside(found.lr, cells)):
        cells.append(dataclasses.replace(found, lr=rate))
    return cells


def _beside(lr: float, cells: list[Cell]) -> float | None:
    """An untried learning rate next to this one, the higher first; None if both were tried."""
    i, tried = GRID.index(lr), {cell.lr for cell in cells}
    return next((rate for rate in (*GRID[i + 1 : i + 2], *GRID[i - 1 : i]) if rate not in tried), None)


def best(cells: list[Cell]) -> Cell | None:
    """The cell with the best validation score; None while a cell is missing."""
    scored = [(cell, cell.read()) for cell in cells]
    if any(numbers is None for _, numbers in scored):
        return None
    return max(scored, key=lambda pair: _merit(pair[0].task, pair[1]["validation"]))[0]


def _merit(task: Task, score: float | None) -> float:
    """The score with its sign, so that higher is better; -inf for a run that diverged."""
    return -math.inf if score is None or math.isnan(score) else task.sign * score


def final_cells(study: Study, task: Task, name: str) -> list[Cell]:
    """The cells of the table, the best rate on every seed; an empty list before the sweep is finished."""
    chosen = best(sweep(study, task, name))
    return [dataclasses.replace(chosen, seed=seed) for seed in study.seeds] if chosen else []


ScoredCells = list[tuple[Cell, dict[str, Any]]]


def scored_cells(study: Study, task: Task, name: str) -> ScoredCells:
    """The cells of the table with their numbers; an empty list before all of them are scored, or without the row."""
    asked = name in study.rows and task.name in study.rows[name].tasks
    cells = [(cell, cell.read() or {}) for cell in final_cells(study, task, name)] if asked else []
    return cells if all("test" in numbers for _, numbers in cells) else []


def is_earlier(cells: ScoredCells) -> bool:
    """Whether a score is of earlier formulas than its row's."""
    return any(cell.is_earlier(numbers) for cell, numbers in cells)


def scores(study: Study, task: Task, name: str) -> Iterator[Cell]:
    """Runs the missing cells of a row's scores, and yields each when it is finished."""
    while cell := next((cell for cell in sweep(study, task, name) if cell.read() is None), None):
        cell.run_or_record_divergence()
        yield cell
    for cell in final_cells(study, task, name):
        if "test" not in (cell.read() or {}):
            cell.score_on_test()
            yield cell
    shutil.rmtree(study.runs / task.name / name, ignore_errors=True)


def timing(study: Study, task: Task, name: str) -> Iterator[Timing]:
    """Runs the timing of a row if it is missing, and yields it."""
    cell = Timing(study, task, name)
    if cell.read() is None:
        cell.run()
        yield cell


PHASES: dict[str, Callable[[Study, Task, str], Iterator[Any]]] = {"scores": scores, "timing": timing}


def missing_runs(study: Study, phase: str, task: Task, name: str) -> int:
    """The number of runs that the row still needs, which is a lower bound for a search."""
    if phase == "timing":
        return int(Timing(study, task, name).read() is None)
    cells, chosen = sweep(study, task, name), final_cells(study, task, name)
    if not chosen:
        ahead = max(0, 3 - len(cells)) if study.search else 0  # a search tries three rates or more
        return sum(cell.read() is None for cell in cells) + ahead + len(study.seeds) - 1
    return sum("test" not in (cell.read() or {}) for cell in chosen)


def task_row_pairs(study: Study, tasks: Sequence[str], rows: Sequence[str]) -> list[tuple[str, str]]:
    """`[(task, row)]` of the pairs that belong to the study."""
    return [(task, name) for task in tasks for name in rows if task in study.rows[name].tasks]
