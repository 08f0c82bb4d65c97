"""The results of a study: one for each cell, from the events in its folder."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lowrank.sweeps import claims
from lowrank.sweeps.axes import Point
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.claims import History, Ledger
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.study import SEED, SEEDS


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of a cell."""

    cell: Cell
    history: History
    state: str  # one of those in `claims`
    score: float  # of the study's metric, NaN for a cell that is not done

    @property
    def summary(self) -> Mapping[str, Any]:
        """The summary of the run; empty for a cell that is not done."""
        return self.history.last.get("summary", {})

    @property
    def group(self) -> Point:
        """The values of the axes without the seeds."""
        return {key: value for key, value in self.cell.point.items() if key not in SEEDS}

    @property
    def seed(self) -> int:
        """The seed of the cell."""
        return int(self.cell.config.get(SEED, 0))


def read_results(study: StudyFolder, now: float, ledger: Ledger | None = None) -> list[Result]:
    """The results of all cells at the store's time `now`, in the order of the study."""
    ledger = ledger or Ledger(study.path, study.limits)
    histories = ledger.histories([cell.key for cell in study.cells])
    return [_result(study, cell, histories[cell.key], now) for cell in study.cells]


def _result(study: StudyFolder, cell: Cell, history: History, now: float) -> Result:
    state = history.state(now, study.limits)
    summary = history.last.get("summary", {}) if state == claims.DONE else {}
    return Result(cell, history, state, score_of(summary, study.metric))


def score_of(summary: Mapping[str, Any], metric: str) -> float:
    """The metric among a summary's scores after training, or else among its own numbers; NaN if it has none."""
    value = summary.get("after", {}).get(metric, summary.get(metric))
    return math.nan if value is None or isinstance(value, bool) else float(value)
