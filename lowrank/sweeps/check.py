"""The check of a study before its first cell starts: every cell's config must make a run."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank.core.errors import UserError
from lowrank.sweeps.cells import Cell
from lowrank.training.build import build_run
from lowrank.training.run import Run

DATA = ("model", "data", "eval", "objective")  # the groups that say which data a run reads


def checked_runs(cells: Sequence[Cell], devices: Sequence[Any] | None = None) -> Iterator[tuple[Cell, Run]]:
    """The run of each cell, none of which is started. Cells of the same data read them once.

    `devices` are those of the mesh if they are not on this machine. Raises UserError naming the first cell whose
    config cannot run.
    """
    alike: dict[str, Run] = {}
    for cell in cells:
        data = json.dumps([cell.config.get(name) for name in DATA])
        try:
            run = build_run(cell.config, devices, like=alike.get(data), planned=devices is not None)
        except UserError as e:
            raise UserError(f"cell {cell.key} ({cell.label}): {e}") from None
        alike.setdefault(data, run)
        yield cell, run
