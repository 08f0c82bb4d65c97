"""The sizes of the study, and the merges that each compares."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.protocol import models
from lowrank.core.errors import unknown


@dataclasses.dataclass(frozen=True)
class Merge:
    """A row of the table: a rule with the options that differ from its defaults, for experts of equal weight."""

    rule: str
    options: Mapping[str, Any]
    density: float | None = None

    @property
    def name(self) -> str:
        """The rule, and its density if it has one."""
        return self.rule if self.density is None else f"{self.rule}-{self.density:g}"


DENSITIES = (0.2, 0.5)
SUM, MEAN = {"weight": 0.4}, {"weight": 1.0}  # sums of task vectors, as task arithmetic's paper scales them, and means
PLAIN = (
    Merge("linear", MEAN),
    Merge("task_arithmetic", SUM),
    Merge("sequential_slerp", MEAN),
    Merge("karcher", MEAN),
    Merge("multislerp", MEAN),
    Merge("model_stock", {}),
    Merge("fisher", MEAN),
    Merge("regmean", {}),
    Merge("mats", {"max_iter": 4}),
)
SPARSE = {
    "ties": MEAN,
    "dare_linear": SUM,
    "dare_ties": SUM,
    "della": MEAN,
    "della_linear": SUM,
    "breadcrumbs": SUM,
    "breadcrumbs_ties": SUM,
}
MERGES = (
    *PLAIN,
    *(Merge(rule, {**of, "density": d}, d) for rule, of in SPARSE.items() for d in DENSITIES),
    *(Merge("sce", {"select_topk": d}, d) for d in DENSITIES),
)
BASELINE = "linear"


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study: `steps` of `batch` rows of `length` tokens for an expert, and `rows` to score a task."""

    model: str
    steps: int
    seeds: int
    rows: int
    batch: int = 4
    length: int = 48
    merges: tuple[Merge, ...] = MERGES
    statistics_rows: int = 8
    negated: str = "record"  # the task whose expert is subtracted from the joint model
    shares: tuple[float, ...] = (0.5, 1.0)  # how much of it is


def first_block() -> str:
    """The folder of a model of one block, which exists after the call."""
    return str(models.write_first_blocks("smollm2-135m", 1))


FEW = tuple(merge for merge in MERGES if merge.name in ("linear", "ties-0.5", "fisher", "regmean", "mats"))
SIZES = {
    "ci": Size("", steps=2, seeds=2, rows=4, length=24, merges=FEW, statistics_rows=4, shares=(1.0,)),
    "small": Size("smollm2-135m", steps=16, seeds=3, rows=12),
}


def get_size(name: str) -> Size:
    """The size of a name. Raises UserError for another one."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name] if SIZES[name].model else dataclasses.replace(SIZES[name], model=first_block())
