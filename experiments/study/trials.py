"""The cells of a study: one row at one learning rate on one seed, each a file, so that a killed study can continue."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.study.study import Row, Study, read_numbers
from experiments.study.tasks import Model, Task
from lowrank import methods
from lowrank.adapters import load
from lowrank.adapters.adapter_files import ABOUT
from lowrank.core import files
from lowrank.core.errors import Diverged
from lowrank.training import loop


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the study."""

    study: Study
    task: Task
    name: str
    lr: float
    seed: int

    @property
    def row(self) -> Row:
        """The row of the cell."""
        return self.study.rows[self.name]

    @property
    def path(self) -> Path:
        """The file of the cell's numbers."""
        return self.study.results / "cells" / self.task.name / self.name / f"lr{self.lr:g}-seed{self.seed}.json"

    @property
    def config(self) -> Any:
        """The config of the cell's run."""
        return self.study.config(self.task, self.row, self.lr, self.seed)

    def read(self) -> dict[str, Any] | None:
        """The cell's numbers; None if it has not run, or ran with another config or, to renew, earlier formulas."""
        numbers = read_numbers(self.path, self.config)
        return None if self.study.renew and numbers and self.is_earlier(numbers) else numbers

    def is_earlier(self, numbers: Mapping[str, Any]) -> bool:
        """Whether `numbers` of this cell are of earlier formulas than the row's."""
        return numbers.get("formulas", 0) < self._formulas

    @property
    def _description(self) -> dict[str, Any]:
        return {"config": files.to_json(self.config), "formulas": self._formulas}

    @property
    def _formulas(self) -> int:
        return self.row.formulas.get(self.task.name, 0)

    def run(self) -> dict[str, Any]:
        """Trains, and stores the numbers; only the seed that chooses the rate is scored on validation."""
        chooses = self.seed == self.study.seeds[0]
        summary = loop.run(self.config, self.folder, before=False, after=chooses)
        numbers = {
            **self._description,
            **({"validation": summary["after"][self.task.metric]} if chooses else {}),
            "trained_params": summary["trained_params"],
            "adapter_kb": _size(self.folder / loop.ADAPTER) / 2**10,
            "seconds": summary["seconds"],
        }
        files.write_json(self.path, numbers)
        return numbers

    def run_or_record_divergence(self) -> None:
        """Trains, and stores the numbers also of a run that diverges, without a score."""
        try:
            self.run()
        except Diverged as e:
            files.write_json(self.path, {**self._description, "validation": None, "why": str(e)})

    @property
    def folder(self) -> Path:
        """The folder of the cell's run."""
        return self.study.runs / self.task.name / self.name / f"lr{self.lr:g}-seed{self.seed}"

    def score_on_test(self) -> dict[str, Any]:
        """The numbers with the test score and the pretraining task's score; trains first if the adapter is missing."""
        numbers = self.read()
        if numbers and "test" in numbers:
            return numbers
        if not numbers or not (self.folder / loop.ADAPTER).exists():
            numbers = self.run()
        options = dict(self.config.model)
        name, dtype = options.pop("name"), options.pop("param_dtype", "float32")
        options = {k: v for k, v in options.items() if k not in ("quantize", "upcycle")}  # an adapter knows its base
        base = load.load_adapted(self.folder / loop.ADAPTER, name, model=options, param_dtype=dtype)
        model = Model(self.config, base, methods.build_method(self.row.method).bind)
        numbers["test"] = model.score("test")[self.task.metric]
        if self.study.forgetting:
            numbers["known"] = self.task.known(model)
        files.write_json(self.path, numbers)
        shutil.rmtree(self.folder)
        return numbers


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.name != ABOUT)
