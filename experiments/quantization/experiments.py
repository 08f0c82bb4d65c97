"""What is tuned on the bases of `rows.py` as the rows of a study, a study for each task."""

from ml_collections import ConfigDict

from experiments.protocol.experiment import Experiment, Row, Size
from experiments.quantization.rows import ROWS
from lowrank.core.config_file import with_changes


def make_experiment(task: str, config: ConfigDict, splits: tuple[str, str], metric: str) -> Experiment:
    """The study of a task: every row is compared with LoRA on the base in float32."""
    rows = {name: row for name, row in ROWS.items() if task in row.tasks}
    labels = {name: dict(zip(("base", "method"), name.split("+"), strict=True)) for name in rows}
    return Experiment(
        name="quantization",
        task=task,
        question="What do fewer bits per weight cost, before tuning and after LoRA on top?",
        metric=metric,
        baseline={"base": "float32", "method": "lora"},
        small=Size(
            with_changes(config, {"log_every": 1}),  # for the time of a step
            tuple(Row(labels[name], row.point, {}, row.rates) for name, row in rows.items()),
            rates=(),
            splits=splits,
        ),
    )
