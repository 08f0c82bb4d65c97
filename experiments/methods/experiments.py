"""The methods of `rows.py` as the rows of a study, a study for each task."""

from ml_collections import ConfigDict

from experiments.methods.rows import ROWS
from experiments.protocol.experiment import Experiment, Row, Size
from lowrank.core.config_file import with_changes

QUESTION = "What does each method reach on the same data and steps, at what cost, and what does the model forget?"


def make_experiment(task: str, config: ConfigDict, splits: tuple[str, str], metric: str) -> Experiment:
    """The study of a task: every row is compared with LoRA. `splits` are those of `Size`."""
    rows = {name: row for name, row in ROWS.items() if task in row.tasks}
    found = tuple(Row({"method": name}, row.point, {}, row.rates(task), row.seeds) for name, row in rows.items())
    base = with_changes(config, {"log_every": 1})  # for the time of a step
    return Experiment(
        name="methods",
        task=task,
        question=QUESTION,
        metric=metric,
        baseline={"method": "lora"},
        small=Size(base, found, rates=(), splits=splits),
    )
