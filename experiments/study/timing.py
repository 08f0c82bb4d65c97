"""The cell of a row's speed: a short run of one method in its own process, of which only the time is measured."""

import dataclasses
import itertools
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from experiments.study.study import Study, read_numbers
from experiments.study.tasks import Task
from lowrank.core import files
from lowrank.training import loop
from lowrank.training.log import LOSS, METRICS, read_metrics

TIMED = 8  # the number of timed steps


@dataclasses.dataclass(frozen=True)
class Timing:
    """A short run of one method in its own process, of which only the time is measured."""

    study: Study
    task: Task
    name: str

    @property
    def path(self) -> Path:
        """The file of the cell's numbers."""
        return self.study.results / "cells" / self.task.name / self.name / "timing.json"

    @property
    def config(self) -> Any:
        """The config of the run: a few steps, each logged, without evaluation."""
        row = self.study.rows[self.name]
        config = self.study.config(self.task, row, row.rates[0], 0)
        config.steps, config.eval, config.log_every = 3 if self.study.quick else TIMED, {}, 1
        return config

    def read(self) -> dict[str, Any] | None:
        """The cell's numbers; None if it has not run, or ran with another config."""
        return read_numbers(self.path, self.config)

    def run(self) -> dict[str, Any]:
        """Trains, and stores the median time of a step and the peak memory of the process."""
        folder = self.study.runs / self.task.name / f"{self.name}-timing"
        summary = loop.run(self.config, folder)
        numbers = {
            "config": files.to_json(self.config),
            "step_s": step_seconds(folder),
            "peak_mb": summary["peak_host_bytes"] / 2**20,
            "load": os.getloadavg()[0],
        }
        files.write_json(self.path, numbers)
        shutil.rmtree(folder)
        return numbers


def step_seconds(folder: Path) -> float:
    """The median time between the losses of two successive steps, all of which are logged."""
    times = [line["seconds"] for line in read_metrics(folder / METRICS) if LOSS in line]
    return statistics.median(b - a for a, b in itertools.pairwise(times))
