"""The choice of the learning rates: for each row the one with the best mean score on validation."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.protocol.experiment import RATE, RATES_FILE, Row, Size
from lowrank.core.errors import UserError
from lowrank.core.paths import AnyPath
from lowrank.sweeps.cells import spell
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.results import Result
from lowrank.sweeps.tables import write_csv


def write_rates(size: Size, study: StudyFolder, results: Sequence[Result], folder: AnyPath) -> AnyPath:
    """Writes `rates.csv`: for each row its best rate, whether that is at an edge of the grid, and all mean scores.

    Raises UserError for a row of which every rate diverged or failed.
    """
    lines, waiting = [], list(results)
    for row in size.rows:
        count = len(size.rates_of(row)) * size.rate_seeds
        block, waiting = waiting[:count], waiting[count:]
        scores = [(r.cell.point[RATE], r.score) for r in block]
        lines.append(rate_line(size, row, scores, study.metric, study.mode))
    return write_csv(folder / RATES_FILE, list(lines[0]), lines)


def rate_line(size: Size, row: Row, scores: Sequence[tuple[float, float]], metric: str, mode: str) -> dict[str, Any]:
    """The line of a row in `rates.csv`, from the pairs of a rate and a score.

    Raises UserError as `write_rates` does.
    """
    rates = size.rates_of(row)
    means = [_mean([score for tried, score in scores if tried == rate]) for rate in rates]
    best = _best(rates, means, mode)
    if best is None:
        raise UserError(f"no learning rate of {', '.join(row.labels.values())} gave a score: lower its rates")
    return {
        **row.labels,
        "lr": rates[best],
        "edge": len(rates) > 1 and best in (0, len(rates) - 1),
        "rates": spell_numbers(rates),
        f"validation_{metric}": spell_numbers(means),
        "seeds": size.rate_seeds,
    }


def _mean(scores: Sequence[float]) -> float:
    """The mean, NaN if a seed has no score: a rate that diverges once is not chosen."""
    return statistics.fmean(scores)


def _best(rates: Sequence[float], scores: Sequence[float], mode: str) -> int | None:
    sign = 1 if mode == "max" else -1
    known = [i for i in range(len(rates)) if not math.isnan(scores[i])]
    return max(known, key=lambda i: sign * scores[i]) if known else None


def spell_numbers(values: Sequence[Any]) -> str:
    """`0.001 0.003`: numbers with four digits."""
    return " ".join(spell(float(f"{value:.4g}")) for value in values)
