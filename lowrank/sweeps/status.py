"""The state of a study as text: how many cells are in which state, and the step and time left of those that run."""

import collections
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from lowrank.core.errors import plural
from lowrank.core.generations import modified_times
from lowrank.sweeps import claims
from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.results import Result, read_results

ORDER: tuple[str, ...] = (
    claims.DONE,
    claims.RUNNING,
    claims.LOST,
    claims.STOPPED,
    claims.WAITING,
    claims.FAILED,
    claims.DIVERGED,
)
ORDER += (claims.REFUSED, claims.PRUNED)


class Status:
    """The state of a study as its folder shows it. Nothing is written."""

    def __init__(self, study: StudyFolder):
        """The status of `study`; events that are read once are not read again."""
        self.study, self.ledger = study, Ledger(study.path, study.limits)
        self.results: list[Result] = []
        self.update()

    def update(self) -> None:
        """Reads what has happened since."""
        self.results = read_results(self.study, self._now(), self.ledger)

    def _now(self) -> float:
        """The store's time of the last write in the folder, or this machine's time if it is later."""
        return max([time.time(), *modified_times(self.ledger.folder).values()])

    @property
    def counts(self) -> dict[str, int]:
        """The number of cells by state, of the states that there are."""
        found = collections.Counter(result.state for result in self.results)
        return {state: found[state] for state in ORDER if found[state]}

    @property
    def finished(self) -> bool:
        """Whether no worker will run a cell again."""
        return all(result.history.is_final(self.study.limits) for result in self.results)

    def headline(self) -> str:
        """`rank: 12 cells, 3 done, 2 running, 7 waiting`."""
        counts = ", ".join(f"{count} {state}" for state, count in self.counts.items())
        return f"{self.study.name}: {plural(len(self.results), 'cell')}, {counts}"

    def rows(self) -> list[list[str]]:
        """`[key, axes, state, step, time left, remark]` of each cell."""
        return [_row(result, self._progress(result)) for result in self.results]

    def _progress(self, result: Result) -> Mapping[str, Any]:
        running = result.state in (claims.RUNNING, claims.LOST)
        return self.ledger.progress(result.history) if running else {}

    def text(self) -> str:
        """The headline and a line for each cell."""
        return "\n".join([self.headline(), "", *_aligned([HEAD, *self.rows()])])


HEAD = ["cell", "point", "state", "step", "ETA", "remark"]


def _row(result: Result, progress: Mapping[str, Any]) -> list[str]:
    step, steps = progress.get("step", 0), progress.get("steps")
    left = tqdm.format_interval(progress["seconds"] / step * (steps - step)) if step and steps else ""
    at = f"{step}/{steps}" if progress else ""
    return [result.cell.key, result.cell.label, result.state, at, left, remark(result)]


def remark(result: Result) -> str:
    """What a reader should know of the cell: its score, its owner or its error, and how often it was tried."""
    last, history = result.history.last, result.history
    score = "" if math.isnan(result.score) else f"score {result.score:.4g}"
    owner = f"by {last['owner']}" if last.get("state") == claims.CLAIMED else ""
    counts = [plural(history.failures, "failure")] * bool(history.failures)
    counts += [f"stopped {plural(history.stops, 'time')}"] * bool(history.stops)
    return "; ".join(part for part in (score, owner, *counts, last.get("why", "")) if part)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
