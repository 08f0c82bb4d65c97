"""A study: its rows, and where its cells are kept."""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lowrank import workdir

SEEDS = (0, 1, 2)


class Row(NamedTuple):
    """What is compared: a method, on a base as `model` says, at the learning rates of the sweep."""

    family: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]
    tasks: tuple[str, ...] = ("topics",)
    model: Mapping[str, Any] = MappingProxyType({})  # beside the task's own options of the model
    optim: Mapping[str, Any] = MappingProxyType({})  # and of the optimizer


@dataclasses.dataclass(frozen=True)
class Study:
    """A folder of `experiments`: its rows, and where cells are kept and runs take place.

    `quick` is one rate, one seed, two steps. `forgetting`: what a tuned model still knows is scored, too.
    """

    name: str
    rows: Mapping[str, Row]
    results: Path
    runs: Path
    quick: bool = False
    forgetting: bool = True

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the table."""
        return SEEDS[:1] if self.quick else SEEDS


def named(name: str, quick: bool = False, results: str = "") -> Study:
    """The study `experiments/NAME`; a quick one keeps its cells in `runs/`."""
    runs = Path("runs") / (f"{name}-quick" if quick else name)
    here = runs / "results" if quick else Path(__file__).parents[1] / name / "results"
    module = importlib.import_module(f"experiments.{name}.rows")
    return Study(name, module.ROWS, Path(results) if results else here, runs, quick, module.FORGETTING)


def kept(path: Path, config: Any) -> dict[str, Any] | None:
    """The numbers in a file; None when there are none, or they are of another config."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("config") == workdir.plain(config) else None
