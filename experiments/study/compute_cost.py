"""The compute of a study: each of its cells records for how many seconds its process held cores of the machine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.study.stages import final_cells, sweep
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.timing import Timing
from lowrank.core import files


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def add_core_seconds(cell: Any, seconds: float) -> dict[str, Any]:
    """Adds `seconds` of this process, times its cores, to the core seconds of a cell; returns the cell's numbers."""
    numbers = cell.read()
    numbers["core_s"] = numbers.get("core_s", 0.0) + seconds * len(cores())
    files.write_json(cell.path, numbers)
    return numbers


def cost_summary(study: Study, task: Task, names: Sequence[str]) -> str:
    """The number of runs of these rows and their minutes on two cores, as text; empty while a cell is missing."""
    cells: dict[Path, Any] = {}
    for name in names:
        for cell in (*sweep(study, task, name), *final_cells(study, task, name), Timing(study, task, name)):
            cells[cell.path] = cell.read()
    if not cells or not all("core_s" in (numbers or {}) for numbers in cells.values()):
        return ""
    minutes = sum(numbers["core_s"] for numbers in cells.values()) / 2 / 60
    return f"{len(cells)} runs, {minutes:.0f} minutes on two cores."
