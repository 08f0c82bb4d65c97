"""A study: a base config, the points of its axes, and how its cells are scored and run. A study is a file.

def get_study(arg=None):
    points = product(axis("method.rank", [1, 4, 16]), seeds(3))
    return Study("rank", base=get_config(arg), points=points, metric="perplexity")
"""

import dataclasses
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.core.paths import expand
from lowrank.objectives import build_objective
from lowrank.sweeps.axes import Point, Points
from lowrank.sweeps.cells import Cell, make_cells, spell

SEED = "seed"  # the axis that a table takes means over
SEEDS = (SEED, "data.seed")  # the keys of its points: the new leaves, and the order of the data
FINAL_LOSS = "final_loss"  # of a run's summary, for a study without held-out data
MODES = ("min", "max")


@dataclasses.dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (Li et al. 2018, arXiv:1810.05934): poor cells stop at a rung.

    The rungs are the evaluations `grace`, `grace * reduction`, `grace * reduction ** 2`, and so on. A cell goes on if
    its score is among the best `1 / reduction` of all the cells that have reached the rung by then.
    """

    grace: int = 1
    reduction: int = 4

    def __post_init__(self) -> None:
        if self.grace < 1 or self.reduction < 2:
            raise UserError(f"halving needs grace >= 1 and reduction >= 2, not {self.grace} and {self.reduction}")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a cell may take, and how often it is tried again."""

    lease: float = 60.0  # seconds without a heartbeat after which another worker takes over a cell
    timeout: float = 0.0  # seconds that one try of a cell may take; 0: any time
    stall: float = 3600.0  # seconds without a line of output after which a cell is found to hang; 0: any time
    retries: int = 1  # how often a cell that fails is tried again
    stops: int = 100  # how often a cell may be preempted or lose its worker, which are not failures

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0 or (field.name == "lease" and self.lease <= 0):
                raise UserError(f"limits.{field.name}={getattr(self, field.name)} is too small")


@dataclasses.dataclass(frozen=True)
class Study:
    """A base config and the points of its axes, which make one cell each."""

    name: str
    base: Mapping[str, Any]  # the config of a run: a ConfigDict or nested dicts
    points: Points
    metric: str = FINAL_LOSS  # a score of the summary after training, or a number of the summary itself
    mode: str = ""  # whether the best is the `min` or the `max`; "": as the objective says
    baseline: Point | None = None  # the values, without a seed, that a table compares all others with
    halving: Halving | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)

    def cells(self) -> list[Cell]:
        """The cells, in the order of the points.

        Raises UserError as `cells.make_cells` does, and for a baseline that is the point of no cell.
        """
        cells, baseline = make_cells(self.base, self.points), self.baseline
        if baseline is not None and not any(baseline.items() <= point.items() for point in self.points):
            raise UserError(f"the study's baseline {spell(baseline)} is the point of none of its cells")
        return cells

    def better(self) -> str:
        """Whether a lower or a higher score is better: `min` or `max`. Raises UserError if that is not known."""
        modes = {FINAL_LOSS: "min", **build_objective(self.base.get("objective", "causal_lm")).score.better}
        if self.mode in MODES:
            return self.mode
        if self.mode or self.metric not in modes:
            known = ", ".join(sorted(modes))
            raise UserError(f"set the study's mode to min or max for metric={self.metric}: it is known for {known}")
        return modes[self.metric]


def load_study(spec: str) -> Study:
    """`get_study(ARG)` of `FILE.py:ARG`. Raises UserError for a file that cannot be read or holds no study."""
    file, colon, arg = expand(spec).partition(":")
    if not Path(file).is_file():
        raise UserError(f"study file {file!r} cannot be read")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    if found is None or found.loader is None:
        raise UserError(f"study file {file!r} is not a Python file")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except (SyntaxError, AttributeError, NameError, ImportError) as e:
        raise UserError(f"study file {file!r} is not a study: {e}") from None
    if not hasattr(module, "get_study"):
        functions = [name for name, _ in inspect.getmembers(module, inspect.isfunction)]
        raise unknown("function that a study file must have,", "get_study", functions)
    study = module.get_study(*[arg] * bool(colon))
    if not isinstance(study, Study):
        raise UserError(f"get_study of {file!r} returns a {type(study).__name__}, not a Study")
    return study
