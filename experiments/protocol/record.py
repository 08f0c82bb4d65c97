"""The scores of runs in a file that is committed: `cells.csv`, a line for each run, from which a table is made.

The folders of the sweeps are large and stay on one machine; a study whose rows are run one at a time, on several days
and machines, keeps what a table needs. A line has the key of its cell, the hash of the config: a line of another config
is not read.
"""

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.protocol.table import as_number, read_rows
from lowrank.adapters.adapter_files import ABOUT
from lowrank.core.paths import AnyPath, children, exists, size
from lowrank.sweeps import claims
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.results import Result
from lowrank.sweeps.tables import write_csv
from lowrank.training.log import LOSS, METRICS, read_metrics
from lowrank.training.loop import ADAPTER

CELLS_FILE = "cells.csv"
COLUMNS = ("task", "row", "phase", "lr", "seed", "key", "score", "trained_params", "adapter_kb", "step_s", "peak_mb")
COLUMNS += ("seconds", "cores", "code", "known", "right")
ENDED = (claims.DONE, claims.DIVERGED)

Line = Mapping[str, str]


class Record:
    """The lines of `cells.csv` in a folder of results."""

    def __init__(self, folder: AnyPath):
        """Reads the file, if it is there."""
        self.path = folder / CELLS_FILE
        self.lines = self._read()

    def _read(self) -> list[Line]:
        return list(read_rows(self.path)) if exists(self.path) else []

    def find(self, keys: Sequence[str]) -> list[Line]:
        """The lines of these cells in their order; an empty list if one is missing."""
        found = {line["key"]: line for line in self.lines}
        return [found[key] for key in keys] if all(key in found for key in keys) else []

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes new lines in place of those of the same task, row and phase; other commands may have written too."""
        new = list(lines)
        place = lambda line: (line["task"], line["row"], line["phase"])  # noqa: E731
        kept = [line for line in self._read() if place(line) not in set(map(place, new))]
        write_csv(self.path, COLUMNS, sorted([*kept, *new], key=lambda line: (*place(line), float(line["lr"]))))
        self.lines = self._read()


def line_of(study: StudyFolder, result: Result, workers: int) -> dict[str, Any]:
    """What a run says of itself; a run that diverged has no score."""
    config, summary, folder = result.cell.config, result.summary, study.run_path(result.cell.key)
    line = {"lr": config["optim"]["lr"], "seed": result.seed, "key": result.cell.key, "score": result.score}
    if not summary:
        return line
    return line | {
        "trained_params": summary["trained_params"],
        "adapter_kb": sum(size(path) for path in children(folder / ADAPTER) if path.name != ABOUT) / 2**10,
        "step_s": step_seconds(folder),
        "peak_mb": summary["peak_host_bytes"] / 2**20,
        "seconds": result.history.last.get("seconds", math.nan),
        "cores": _cores() // workers,
        "code": result.history.last.get("code", ""),
    }


def step_seconds(folder: AnyPath) -> float:
    """The median time between the losses of two successive steps that are logged, for one step."""
    lines = [line for line in read_metrics(folder / METRICS) if LOSS in line]
    spans = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(lines)]
    return statistics.median(spans) if spans else math.nan


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers(lines: Iterable[Line], column: str) -> dict[int, float]:
    """`{seed: number}` of a column, without the seeds that lack it."""
    found = {int(line["seed"]): as_number(line[column]) for line in lines}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}
