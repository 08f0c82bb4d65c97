"""A study: its rows, its seeds, and the folders of its cells and runs."""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lowrank.core import files

SEEDS = (0, 1, 2)
GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))  # the rates of a search


class Row(NamedTuple):
    """An entry of the comparison: a method, the options of its base, and the learning rates of its sweep.

    The row is timed at the first rate. The number of a task in `formulas` is raised where the method computes something
    else under the same config: a table marks the scores of cells that have a lower number.
    """

    family: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]
    tasks: tuple[str, ...] = ("topics",)
    model: Mapping[str, Any] = MappingProxyType({})  # in addition to the task's own model options
    optim: Mapping[str, Any] = MappingProxyType({})  # in addition to the task's own optimizer options
    formulas: Mapping[str, int] = MappingProxyType({})  # by task, 0 if it is missing


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder of `experiments`: its rows, and the folders of its cells and runs.

    With `quick`, a row has one rate, one seed, and two steps on a few examples. With `forgetting`, the tuned model is
    also scored on its pretraining task. With `search`, a sweep continues from the rates of a row along `GRID` until the
    rates on both sides of the best one are worse. `settings` replaces settings of a task, by dotted key. With
    `renew`, scores of earlier formulas than their row's count as missing.
    """

    name: str
    rows: Mapping[str, Row]
    results: Path
    runs: Path
    quick: bool = False
    forgetting: bool = True
    search: bool = False
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    renew: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the table."""
        return SEEDS[:1] if self.quick else SEEDS

    def config(self, task: Any, row: Row, lr: float, seed: int) -> ConfigDict:
        """The config of one run of a `tasks.Task`."""
        config = task.config(row, lr, seed)
        config.update_from_flattened_dict(self.settings.get(task.name, {}))
        if self.quick:
            config.steps, config.optim.warmup, config.eval.max_examples = 2, 0, 8
        return config


def load_study(name: str, quick: bool = False, results: str = "", renew: bool = False) -> Study:
    """The study `experiments/NAME`; a quick study stores its cells in `runs/`."""
    runs = Path("runs") / (f"{name}-quick" if quick else name)
    here = runs / "results" if quick else Path(__file__).parents[1] / name / "results"
    module = importlib.import_module(f"experiments.{name}.rows")
    asked = (module.FORGETTING, module.SEARCH and not quick, module.SETTINGS)
    return Study(name, module.ROWS, Path(results) if results else here, runs, quick, *asked, renew)


def read_numbers(path: Path, config: Any) -> dict[str, Any] | None:
    """The numbers in the file of a cell; None if the file does not exist or is of another config."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("config") == files.to_json(config) else None
