"""Runs the study: `python -m experiments.intrinsic_dimension [--size=small] [--workers=1] [--folder=DIR] [...]`.

    --size=small     ci (two steps, to see that all works), small (real weights and text), or paper
    --workers=1      processes that run cells side by side on this machine; 0: use what is done
    --folder=DIR     the folder of the sweeps; by default runs/intrinsic_dimension/SIZE
    --results=DIR    where tables and plots go; by default beside the study for `small`, else in runs/
    --config.a.b=c   changes the config of every run

The bisection is adaptive: each of its phases is a sweep of one run for every row and seed that is still searching. The
same command continues a study that was stopped, and runs no cell twice.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.intrinsic_dimension import search, table
from experiments.intrinsic_dimension.search import BISECT, FILES, FULL, METRIC, NAME, RATES, Size
from experiments.protocol import models
from experiments.protocol.command import parse
from experiments.protocol.experiment import RATE, ROOT
from launch import command, sweep
from lowrank.core.errors import UserError
from lowrank.core.files import write_text
from lowrank.core.paths import AnyPath, as_path, exists
from lowrank.sweeps.folder import read_folder
from lowrank.sweeps.results import Result
from lowrank.sweeps.status import Status
from lowrank.sweeps.tables import write_csv


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        args, changes = parse(NAME, __doc__, argv)
        size = search.get_size(args.size)
        results = as_path(args.results) if args.results else search.results_folder(args.size)
        folder = as_path(args.folder or f"runs/{NAME}/{args.size}")
        if args.size != "paper":
            models.write_first_blocks(search.MINILM, 3)
            models.write_random(search.MINILM)
        for phase, rounds in ((FULL, 1), (RATES, 1), (BISECT, longest_search(size))):
            for i in range(rounds):
                name = f"{phase}-{i + 1}" if rounds > 1 else phase
                if code := _run_phase(args, changes, size, phase, folder / name, results):
                    return code
        _finish(size, args.size, results)
    except (OSError, UserError) as e:
        return command.print_error(e)
    return 0


def longest_search(size: Size) -> int:
    """The number of runs that a search among the most dimensions takes."""
    return max(math.ceil(math.log2(len(row.candidates) + 1)) for row in size.rows)


def _run_phase(
    args: argparse.Namespace, changes: Sequence[str], size: Size, phase: str, folder: AnyPath, results: AnyPath
) -> int:
    """Runs a sweep to its end and records its scores; returns the exit code, 0 if the next one may start."""
    if exists(folder / DONE) or not search.POINTS[phase](size, results):
        return 0
    if args.workers:
        study = f"--study={ROOT / NAME / 'search.py'}:{args.size},{phase},{results}"
        code = sweep.main([study, f"--folder={folder}", f"--workers={args.workers}", *changes])
        if code not in (0, 1):
            return code
    status = Status(read_folder(folder))
    if not status.finished:
        print(f"{status.headline()}: the same command continues")
        return 1
    RECORD[phase](size, status.results, results)
    write_text(folder / DONE, "recorded\n")
    return 0


DONE = "recorded.txt"


def _record_full(size: Size, found: Sequence[Result], results: AnyPath) -> None:
    blocks = [found[i : i + size.seeds] for i in range(0, len(found), size.seeds)]
    lines = [
        {
            "model": of[0].cell.point["model.name"],
            "lr": of[0].cell.point[RATE],
            METRIC: statistics.fmean(map(_score, of)),
            "seeds": len(of),
        }
        for of in blocks
    ]
    write_csv(results / FILES[FULL], list(lines[0]), lines)


def _record_rates(size: Size, found: Sequence[Result], results: AnyPath) -> None:
    keys = [(i, c) for i in range(len(size.rows)) for c in size.steps]
    lines = [
        {"row": i, **size.rows[i].labels, "dimension": search.middle(size.rows[i]), "c": c, METRIC: _score(result)}
        for (i, c), result in zip(keys, found, strict=True)
    ]
    write_csv(results / FILES[RATES], list(lines[0]), lines)


def _record_trials(size: Size, found: Sequence[Result], results: AnyPath) -> None:
    """Adds the runs of one round to `trials.csv`."""
    path = results / FILES[BISECT]
    before: list[Any] = list(search.read_lines(results, BISECT)) if exists(path) else []
    lines = [
        {
            "row": _row_index(size, result),
            "seed": result.seed,
            "dimension": result.cell.point["method"]["dim"],
            METRIC: _score(result),
            "trained_params": result.summary.get("trained_params", ""),
            "seconds": result.summary.get("seconds", math.nan),
        }
        for result in found
    ]
    write_csv(path, list(lines[0]), [*before, *lines])


def _row_index(size: Size, result: Result) -> int:
    point = result.cell.point
    fits = [r.model == point["model.name"] and r.method.items() <= point["method"].items() for r in size.rows]
    return fits.index(True)


RECORD = {FULL: _record_full, RATES: _record_rates, BISECT: _record_trials}


def _score(result: Result) -> float:
    """The score of a run, 0 for one that diverged or failed."""
    return 0.0 if math.isnan(result.score) else result.score


def _finish(size: Size, name: str, results: AnyPath) -> None:
    """Writes the table, and that of the README for the committed results."""
    table.write_table(size, results)
    if results == search.results_folder("small"):
        tables.rewrite(Path(ROOT / NAME / "README.md"))
    print(table.markdown(results))
