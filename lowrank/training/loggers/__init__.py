"""Loggers: sinks of a run's numbers beside `metrics.jsonl`. A new logger is one file and one line in `LOGGERS`."""

from collections.abc import Callable, Sequence

from lowrank.core.errors import unknown
from lowrank.training.loggers.logger import LoggedRun, Logger
from lowrank.training.loggers.mlflow import MLflow
from lowrank.training.loggers.tensorboard import TensorBoard
from lowrank.training.loggers.wandb import WandB

LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not in `LOGGERS`."""
    for name in names:
        if name not in LOGGERS:
            raise unknown("logger", name, LOGGERS)


__all__ = ["LOGGERS", "LoggedRun", "Logger", "check_loggers"]
