"""A study of `experiments/` as data: its rows in every size, and the sweeps that they become.

The phase `rates` tries learning rates on seeds that the final phase does not use, and scores them on the validation
split. The final phase trains each row on its best rate, and scores it on the test split.
"""

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.config_file import with_changes
from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import AnyPath, as_path, exists
from lowrank.sweeps.axes import Point, Points, axis, chain, combine, product, seeds
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.study import Limits, Study

ROOT = Path(__file__).parents[1]
RATES, FINAL = "rates", "final"
PHASES = (RATES, FINAL)
RATE = "optim.lr"
FIRST_RATE_SEED = 100  # the final phase counts its seeds from 0
RATES_FILE, TABLE_FILE, PLOT_FILE = "rates.csv", "table.csv", "plot.png"
CI_STEPS, CI_EXAMPLES = 2, 8


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: what is trained, and what a paper prints for it."""

    labels: Mapping[str, str]  # the columns that name the row, which have the same keys in every row
    point: Point  # config keys and their values
    printed: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # a column of the paper's table -> its figure, as printed
    rates: tuple[float, ...] = ()  # the learning rates to try, from low to high; (): those of the size
    seeds: int = 0  # of the final phase; 0: as many as the size says

    @property
    def name(self) -> str:
        """The labels in one word, as a command names the row."""
        return "+".join(self.labels.values())


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of a study: the config of a run, the rows, and how many runs each of them gets."""

    base: Mapping[str, Any]
    rows: tuple[Row, ...]
    rates: tuple[float, ...]  # from low to high
    seeds: int = 5  # of the final phase
    rate_seeds: int = 2
    splits: tuple[str, str] = ("validation", "test")  # for the choice of the rate, and for the score
    metric: str = ""  # "": that of the study

    def rates_of(self, row: Row) -> tuple[float, ...]:
        """The learning rates that are tried for a row."""
        return row.rates or self.rates

    def seeds_of(self, row: Row) -> int:
        """The number of seeds of a row in the final phase."""
        return row.seeds or self.seeds

    def only(self, name: str) -> "Size":
        """The size with the row of a name alone. Raises UserError for a name that is no row's."""
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise unknown("row", name, rows)
        return dataclasses.replace(self, rows=(rows[name],))

    def find(self, labels: Mapping[str, str]) -> Row:
        """The first row that has these labels among its own."""
        return next(row for row in self.rows if labels.items() <= row.labels.items())

    def ci(self, baseline: Mapping[str, str]) -> "Size":
        """The smallest version: the baseline and another row, two rates, two steps and a few examples."""
        fewer = lambda point: {"steps": CI_STEPS} if "steps" in point else {}  # noqa: E731
        first = self.find(baseline)
        rows = tuple(
            dataclasses.replace(row, point={**row.point, **fewer(row.point)}, rates=self.rates_of(row)[:2], seeds=0)
            for row in (first, next(row for row in self.rows if row is not first))
        )
        changes = {"steps": CI_STEPS, "optim.warmup": 0, "eval.max_examples": CI_EXAMPLES, "log_every": 1}
        return dataclasses.replace(self, base=with_changes(self.base, changes), rows=rows, seeds=3, rate_seeds=1)


Analysis = Callable[["Experiment", StudyFolder, AnyPath], None]  # (study, final phase, results) -> further files
Plot = Callable[["Experiment", Sequence[Mapping[str, str]]], bytes]  # (study, rows of table.csv) -> PNG
Text = Callable[["Experiment", Path], str]  # (study, results) -> Markdown


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A study: a question, its rows in every size, and the paper whose figures stand beside ours."""

    name: str
    question: str
    metric: str
    baseline: Mapping[str, str]  # labels of the row that all others are compared with
    small: Size
    paper: Size | None = None
    task: str = ""  # the study file in the folder, where it is not `study`
    within: tuple[str, ...] = ()  # labels that a row and its baseline have in common
    source: str = ""  # where the printed figures stand: the paper and the number of its table
    analyze: Analysis | None = None
    plot: Plot | None = None  # None: one point with its interval for each row
    mode: str = ""  # whether the best score is the `min` or the `max`; "": as the objective says
    prepare: Callable[[], None] | None = None  # makes the files that the runs of `ci` and `small` read
    more: Text | None = None  # follows the table in the README, once that exists

    @property
    def sizes(self) -> dict[str, Size]:
        """The sizes by name; `ci` is made of `small`."""
        paper = {"paper": self.paper} if self.paper else {}
        return {"ci": self.small.ci(self.baseline), "small": self.small, **paper}

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of the table that name a row."""
        return tuple(self.small.rows[0].labels)

    def size(self, name: str) -> Size:
        """The size of a name. Raises UserError for another one."""
        if name not in self.sizes:
            raise unknown("size", name, self.sizes)
        return self.sizes[name]

    def file(self) -> Path:
        """The study file, for `launch.sweep`."""
        return ROOT / self.name / f"{self.task or 'study'}.py"

    def results(self, size: str) -> AnyPath:
        """The folder of the results: that of the repository for `small`, and one under `runs/` for the others."""
        self.size(size)
        return ROOT / self.name / "results" if size == "small" else as_path(f"runs/{self.name}/{size}/results")

    def get_study(self, arg: str | None = None) -> Study:
        """The sweep of `SIZE[,PHASE[,RESULTS[,ROW]]]`; by default the final phase, with the best rates in its results.

        With ROW it is the sweep of one row. Raises UserError for an unknown size, phase or row, and for a final phase
        whose rates were not searched.
        """
        size, phase, results, row, *more = [*(arg or "small").split(","), "", "", "", ""][:5]
        if more != [""]:
            raise UserError(f"the study's argument {arg!r} is not SIZE,PHASE,RESULTS,ROW")
        found = self.size(size).only(row) if row else self.size(size)
        if (phase or FINAL) not in PHASES:
            raise unknown("phase", phase, PHASES)
        if phase == RATES:
            return self._sweep(found, size, RATES, rate_points(found))
        best = read_rates(as_path(results) if results else self.results(size), found, f"{self.name} --size={size}")
        return self._sweep(found, size, FINAL, final_points(found, best))

    def final_study(self, size: str, row: str, rate: float) -> Study:
        """The final phase of a row at this rate."""
        found = self.size(size).only(row)
        return self._sweep(found, size, FINAL, final_points(found, [rate]))

    def _sweep(self, size: Size, name: str, phase: str, points: Points) -> Study:
        split = size.splits[PHASES.index(phase)]
        return Study(
            "-".join(part for part in (self.name, self.task, name, phase) if part),
            with_changes(size.base, {"eval.split": split, "loggers": []}),
            points,
            metric=size.metric or self.metric,
            mode=self.mode,
            baseline=dict(size.find(self.baseline).point) if len(size.rows) > 1 else None,
            limits=Limits(stall=0),
        )


def rate_points(size: Size) -> Points:
    """Every row at each of its learning rates, on seeds of their own."""
    tries = _seeds(size.rate_seeds, FIRST_RATE_SEED)
    return chain(*(product((row.point,), axis(RATE, size.rates_of(row)), tries) for row in size.rows))


def final_points(size: Size, best: Sequence[float]) -> Points:
    """Every row at its best learning rate, on the seeds of the table."""
    pairs = zip(size.rows, best, strict=True)
    return chain(*(product(({**row.point, RATE: rate},), _seeds(size.seeds_of(row), 0)) for row, rate in pairs))


def _seeds(count: int, first: int) -> Points:
    """Seeds that draw the new leaves and the order of the data."""
    return combine(seeds(count, first), axis("data.seed", range(first, first + count)))


def read_rates(results: AnyPath, size: Size, command: str) -> list[float]:
    """The best rate of each row from `rates.csv`. Raises UserError if it is missing or of other rows."""
    path = results / RATES_FILE
    if not exists(path):
        raise UserError(f"{path} is missing: python -m experiments.{command} searches the learning rates first")
    found = list(csv.DictReader(path.read_text().splitlines()))
    labels = [
        {key: line[key] for key in row.labels if key in line} for line, row in zip(found, size.rows, strict=False)
    ]
    if len(found) != len(size.rows) or labels != [dict(row.labels) for row in size.rows]:
        raise UserError(f"{path} is of other rows than the study: delete it and search the learning rates again")
    return [float(line["lr"]) for line in found]
