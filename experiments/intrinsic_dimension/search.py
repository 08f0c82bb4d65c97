"""The sweeps of the study: full tuning, the learning rates of the short vectors, and the steps of the bisection.

d90 is the smallest dimension in which a run reaches 90 % of the accuracy of full tuning of the same model, which is the
mean over the seeds at its best rate. Each seed searches on its own (see `bisection`). The learning rate in dimension d
is c / sqrt(d): a step of Adam is as long in every dimension. The new head is trained beside the vector at a rate of its
own, which does not depend on d, and its parameters are not counted.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.intrinsic_dimension.bisection import next_dimension
from experiments.protocol import models, paper_runs, tasks
from experiments.protocol.experiment import FIRST_RATE_SEED, RATE, ROOT
from lowrank.core.config_file import with_changes
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import AnyPath, as_path, exists
from lowrank.sweeps.axes import Point, Points
from lowrank.sweeps.study import Limits, Study

NAME, METRIC, SHARE = "intrinsic_dimension", "accuracy", 0.9
FULL, RATES, BISECT = "full", "rates", "bisect"  # the phases
FILES = {FULL: "full.csv", RATES: "rates.csv", BISECT: "trials.csv"}
SAID, FASTFOOD, DENSE = {"said": True}, {"projection": "fastfood"}, {"projection": "dense"}
ATTENTION, QUERIES = r"layers/attn/(q|k|v|o)/kernel", r"layers/attn/q/kernel"
HEAD_RATE = 3e-2  # the learning rate of the head, the best of it alone in the table of methods


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: what is projected how, in which model, and the dimensions among which d90 is searched."""

    labels: Mapping[str, str]
    model: str
    method: Mapping[str, Any]
    candidates: tuple[int, ...]
    printed: str = ""

    def point(self, dimension: int, c: float, seed: int) -> Point:
        """A run in a dimension."""
        rate, method = c / math.sqrt(dimension), {"name": "intrinsic", "dim": dimension, **self.method}
        ratios = (("head/.*", HEAD_RATE / rate),)
        return {**_run(self.model, rate, seed), "method": method, "optim.lr_ratios": ratios}


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study."""

    base: Any
    rows: tuple[Row, ...]
    full_rates: tuple[float, ...]
    steps: tuple[float, ...]  # the numbers c that are tried
    seeds: int
    splits: tuple[str, str]  # for the choice of c, and for all else


def powers(low: int, high: int) -> tuple[int, ...]:
    """The powers of two from `2**low` to `2**high`."""
    return tuple(2**k for k in range(low, high + 1))


def _run(model: str, rate: float, seed: int) -> Point:
    return {"model.name": model, RATE: rate, "seed": seed, "data.seed": seed}


MINILM, FIRST_3, RANDOM = (
    "minilm-l6",
    str(models.first_blocks_folder("minilm-l6", 3)),
    str(models.random_folder("minilm-l6")),
)
KERNELS, QUERY = "attention", "queries"


def _small_row(
    model: str, name: str, part: str, projection: str, method: Mapping[str, Any], low: int, high: int
) -> Row:
    labels = {"model": name, "projected into": part, "projection": projection}
    target = {KERNELS: ATTENTION, QUERY: QUERIES}[part]
    return Row(labels, model, {**method, "target": target}, powers(low, high))


SMALL_ROWS = (
    _small_row(MINILM, "MiniLM-L6", KERNELS, "Fastfood", FASTFOOD, 2, 12),
    _small_row(MINILM, "MiniLM-L6", KERNELS, "SAID", SAID, 4, 12),
    _small_row(FIRST_3, "its first 3 blocks", KERNELS, "Fastfood", FASTFOOD, 2, 12),
    _small_row(RANDOM, "its shape, random", KERNELS, "Fastfood", FASTFOOD, 2, 12),
    _small_row(MINILM, "MiniLM-L6", QUERY, "Fastfood", FASTFOOD, 2, 8),
    _small_row(MINILM, "MiniLM-L6", QUERY, "dense", DENSE, 2, 8),
)


def _paper_row(model: str, name: str, projection: str, method: Mapping[str, Any], printed: str) -> Row:
    labels = {"model": name, "projected into": "all but the head", "projection": projection}
    return Row(labels, f"{paper_runs.MODELS}/{model}", method, powers(6, 14), printed)


PAPER_ROWS = (
    _paper_row("roberta-base", "RoBERTa-base", "SAID", SAID, "896"),
    _paper_row("roberta-base", "RoBERTa-base", "Fastfood", FASTFOOD, "1000"),
)
MRPC = with_changes(
    paper_runs.mnli("roberta-base", steps=2_000, batch_size=32, seq_len=128, warmup=120),
    {
        "data.source": "tfds:glue/mrpc",
        "data.template": "{sentence1} {sentence2}",
        "data.split": "train",
        "data.labels": ("not_equivalent", "equivalent"),
    },
)
SMALL = Size(tasks.topics(), SMALL_ROWS, (3e-4, 1e-3), (1.0, 3.0), 3, ("validation", "test"))
CI = Size(
    with_changes(tasks.topics(), {"steps": 2, "optim.warmup": 0, "eval.max_examples": 8, "log_every": 1}),
    tuple(dataclasses.replace(row, candidates=(16, 32)) for row in SMALL_ROWS[:2]),
    (3e-4,),
    (3.0,),
    2,
    SMALL.splits,
)
SIZES = {
    "ci": CI,
    "small": SMALL,
    "paper": Size(MRPC, PAPER_ROWS, (1e-5, 3e-5), (1.0, 3.0, 10.0), 5, ("validation", "validation")),
}


def results_folder(size: str) -> AnyPath:
    """The folder of the results: that of the repository for `small`, and one under `runs/` for the others."""
    return ROOT / NAME / "results" if size == "small" else as_path(f"runs/{NAME}/{size}/results")


def get_size(name: str) -> Size:
    """The size of a name. Raises UserError for another one."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]


def get_study(arg: str | None = None) -> Study:
    """The sweep of `SIZE[,PHASE[,RESULTS]]`, by default of `full`; later phases read the files of earlier ones.

    Raises UserError for an unknown size or phase, for a missing file, and for a search that has ended.
    """
    name, phase, results, *_ = [*(arg or "small").split(","), "", ""]
    size, phase = get_size(name), phase or FULL
    if phase not in POINTS:
        raise unknown("phase", phase, POINTS)
    points = POINTS[phase](size, as_path(results) if results else results_folder(name))
    if not points:
        raise UserError(f"{NAME}: every search has ended; python -m experiments.{NAME} --size={name} writes the table")
    base = with_changes(size.base, {"eval.split": size.splits[phase != RATES], "loggers": []})
    return Study(f"{NAME}-{name}-{phase}", base, points, metric=METRIC, limits=Limits(stall=0))


def full_points(size: Size, results: AnyPath) -> Points:
    """Full tuning of each model at each rate."""
    del results
    full = {"method": {"name": "full"}}
    return tuple(
        {**_run(model, rate, seed), **full}
        for model in dict.fromkeys(row.model for row in size.rows)
        for rate in size.full_rates
        for seed in range(size.seeds)
    )


def rate_points(size: Size, results: AnyPath) -> Points:
    """Each row in its middle dimension with every c, on a seed of its own."""
    del results
    return tuple(row.point(middle(row), c, FIRST_RATE_SEED) for row in size.rows for c in size.steps)


def middle(row: Row) -> int:
    """The dimension in which c is chosen."""
    return row.candidates[len(row.candidates) // 2]


def bisection_points(size: Size, results: AnyPath) -> Points:
    """The next run of every row and seed whose search has not ended."""
    found = []
    for i, (row, c) in enumerate(zip(size.rows, best_steps(size, results), strict=True)):
        for seed in range(size.seeds):
            if dimension := next_dimension(row.candidates, read_reached(size, results, i, seed)):
                found.append(row.point(dimension, c, seed))
    return tuple(found)


POINTS: dict[str, Callable[[Size, AnyPath], Points]] = {FULL: full_points, RATES: rate_points, BISECT: bisection_points}


def best_steps(size: Size, results: AnyPath) -> list[float]:
    """The best c of every row, from `rates.csv`."""
    lines = read_lines(results, RATES)
    scores = [[line for line in lines if int(line["row"]) == i] for i in range(len(size.rows))]
    return [float(max(of, key=lambda line: float(line[METRIC]))["c"]) for of in scores]


def full_accuracy(results: AnyPath, model: str) -> float:
    """The mean accuracy of full tuning at its best rate, from `full.csv`."""
    return max(float(line[METRIC]) for line in read_lines(results, FULL) if line["model"] == model)


def read_reached(size: Size, results: AnyPath, row: int, seed: int) -> dict[int, bool]:
    """Whether a row and seed reached the share in each dimension that was tried, from `trials.csv`."""
    if not exists(results / FILES[BISECT]):
        return {}
    enough = SHARE * full_accuracy(results, size.rows[row].model)
    lines = [line for line in read_lines(results, BISECT) if (int(line["row"]), int(line["seed"])) == (row, seed)]
    return {int(line["dimension"]): float(line[METRIC]) >= enough for line in lines}


def read_lines(results: AnyPath, phase: str) -> Sequence[Mapping[str, str]]:
    """The lines of a phase's file. Raises UserError if it is missing."""
    path = results / FILES[phase]
    if not exists(path):
        raise UserError(f"{path} is missing: python -m experiments.{NAME} runs the phase {phase} first")
    return list(csv.DictReader(path.read_text().splitlines()))
