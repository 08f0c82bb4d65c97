"""Asynchronous successive halving: which cells go on from a rung (Li et al. 2018, arXiv:1810.05934)."""

import json
from collections.abc import Sequence

from lowrank.core.files import read_json
from lowrank.core.generations import modified_times
from lowrank.core.paths import AnyPath
from lowrank.sweeps.claims import create
from lowrank.sweeps.study import Halving

RUNGS = "rungs"  # a folder of a study, with a file for each cell at each rung


def rungs(halving: Halving, evaluations: int) -> list[int]:
    """The rungs among the first `evaluations` evaluations of a run, counted from 1."""
    found, rung = [], halving.grace
    while rung <= evaluations:
        found.append(rung)
        rung *= halving.reduction
    return found


def goes_on(score: float, scores: Sequence[float], halving: Halving, mode: str) -> bool:
    """Whether a cell with `score` goes on from a rung that cells with `scores`, its own among them, have reached.

    It does if at most `(n - 1) / reduction` of the n scores are better: the rule of Ray Tune, whose cutoff is the
    quantile `1 - 1 / reduction`. A score that is not a number never does, unless it is alone.
    """
    better = sum(other < score if mode == "min" else other > score for other in scores)
    alone = len(scores) <= 1
    return alone or (score == score and better <= (len(scores) - 1) / halving.reduction)


def record_score(folder: AnyPath, rung: int, key: str, score: float) -> list[float]:
    """Records a cell's score at a rung, once, and returns the scores of all cells there."""
    level = folder / RUNGS / str(rung)
    create(level / f"{key}.json", json.dumps(str(score)).encode())
    return [float(read_json(level / name)) for name in modified_times(level)]
