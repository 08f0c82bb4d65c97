"""Runs the study: `python -m experiments.objectives [--size=small] [--workers=1] [--folder=DIR] [--results=DIR]`.

    --size=small     ci (two steps, to see that all works), or small
    --workers=1      0 writes the tables of what is done
    --folder=DIR     the folder of the runs and of their numbers; by default runs/objectives/SIZE
    --results=DIR    where tables and plots go; by default experiments/objectives/results for `small`, else in runs/

It trains and measures every row of every part on its seeds. The same command continues a study that was stopped: a row
is not run again on a seed while the file of its numbers exists.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.merging.sizes import first_block
from experiments.objectives import infilling, preferences, replay, table
from experiments.objectives.part import Part, Size
from experiments.protocol import measures, plain_command
from lowrank.core.config_file import with_changes
from lowrank.core.errors import unknown
from lowrank.core.files import write_json
from lowrank.training import loop

NAME = "objectives"
PARTS = {part.name: part for part in (preferences.PART, infilling.PART, replay.PART)}
SIZES = {
    "ci": Size("", steps=2, seeds=2, records=4, start_steps=2),
    "small": Size("smollm2-135m", steps=16, seeds=3, records=36, start_steps=24),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parts = (get_size, run, _write, markdown)
    return plain_command.main(NAME, __doc__, argv, *parts)


def markdown(results: Path) -> str:
    """The tables of all parts."""
    return table.markdown(PARTS, results)


def _write(size: Size, folder: Path, results: Path) -> None:
    for part in PARTS.values():
        table.write_table(part, size.seeds, folder, results)


def get_size(name: str) -> Size:
    """The size of a name. Raises UserError for another one."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name] if SIZES[name].model else dataclasses.replace(SIZES[name], model=first_block())


def run(size: Size, folder: Path) -> None:
    """Runs every part, row and seed whose file is missing."""
    cells = [(part, *cell) for part in PARTS.values() for cell in table.cells(part, size.seeds)]
    missing = [cell for cell in cells if not table.path(folder, *cell).exists()]
    for part in PARTS.values():
        if any(cell[0] is part for cell in missing):
            part.prepare(size)
    for part, row, seed in tqdm(missing, unit="run", dynamic_ncols=True):
        run_cell(size, folder, part, row, seed)


def run_cell(size: Size, folder: Path, part: Part, row: str, seed: int) -> None:
    """Trains a row on a seed, and writes the numbers of its model; the start is measured as it is."""
    path, config, adapter = table.path(folder, part, row, seed), part.config(size).to_dict(), None
    runs = folder / "runs" / path.stem
    if row != table.START:
        config = with_changes(config, {**part.rows[row], "seed": seed, "data.seed": seed})
        loop.run(ConfigDict(config), runs)
        adapter = runs / loop.ADAPTER
    write_json(path, dict(part.measure(measures.load_model(config, adapter), size)))
    shutil.rmtree(runs, ignore_errors=True)
