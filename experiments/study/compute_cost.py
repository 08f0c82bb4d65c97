"""What a study takes: each of its cells says for how many seconds its process held a core of the machine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.study.stages import finals, sweep
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.timing import Timing
from lowrank.core import files


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))


def spend(cell: Any, seconds: float) -> dict[str, Any]:
    """Adds `seconds` of this process, on all its cores, to what a cell took; returns its numbers."""
    numbers = cell.read()
    numbers["core_s"] = numbers.get("core_s", 0.0) + seconds * len(cores())
    files.write_json(cell.path, numbers)
    return numbers


def sentence(study: Study, task: Task, names: Sequence[str]) -> str:
    """How many runs these rows are, and the minutes that they took on two cores; empty while a cell is missing."""
    cells: dict[Path, Any] = {}
    for name in names:
        for cell in (*sweep(study, task, name), *finals(study, task, name), Timing(study, task, name)):
            cells[cell.path] = cell.read()
    if not cells or not all("core_s" in (numbers or {}) for numbers in cells.values()):
        return ""
    minutes = sum(numbers["core_s"] for numbers in cells.values()) / 2 / 60
    return f"{len(cells)} runs, {minutes:.0f} minutes on two cores."
