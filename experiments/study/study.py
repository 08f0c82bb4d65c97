"""A study: its rows, and where its cells are kept."""

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
GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))  # where a search may go


class Row(NamedTuple):
    """What is compared: a method, on a base as `model` says, and the rates of its sweep; it is timed at the first."""

    family: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]
    tasks: tuple[str, ...] = ("topics",)
    model: Mapping[str, Any] = MappingProxyType({})  # beside the task's own options of the model
    optim: Mapping[str, Any] = MappingProxyType({})  # and of the optimizer


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder of `experiments`: its rows, and where cells are kept and runs take place.

    `quick` is one rate, one seed, two steps on a few examples. `forgetting`: what a tuned model still knows is scored,
    too. `search`: a sweep goes on from the rates that a row names, along `GRID`, until those on both sides of the best
    one are worse. `settings`: where its runs of a task differ from the task's own, by dotted key.
    """

    name: str
    rows: Mapping[str, Row]
    results: Path
    runs: Path
    quick: bool = False
    forgetting: bool = True
    search: bool = False
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

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


def named(name: str, quick: bool = False, results: str = "") -> Study:
    """The study `experiments/NAME`; a quick one keeps its cells in `runs/`."""
    runs = Path("runs") / (f"{name}-quick" if quick else name)
    here = runs / "results" if quick else Path(__file__).parents[1] / name / "results"
    module = importlib.import_module(f"experiments.{name}.rows")
    asked = (module.FORGETTING, module.SEARCH and not quick, module.SETTINGS)
    return Study(name, module.ROWS, Path(results) if results else here, runs, quick, *asked)


def kept(path: Path, config: Any) -> dict[str, Any] | None:
    """The numbers in a file; None when there are none, or they are of another config."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("config") == files.to_json(config) else None
