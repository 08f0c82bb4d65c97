"""Weights & Biases: a W&B run, which a resumed run continues. Environment variables set its project and its mode."""

from collections.abc import Mapping
from typing import Any

from lowrank.training.loggers.logger import LoggedRun, finite, import_extra

FILE = "wandb_run.json"  # in the run's folder: the id of the W&B run


class WandB:
    """A W&B run whose horizontal axis is the training step, so that the steps after a resume may be logged again."""

    def __init__(self, run: LoggedRun):
        self._wandb: Any = import_extra("wandb")
        known = run.saved_id(FILE)
        self._run = self._wandb.init(
            id=known, resume="allow" if known else None, name=run.folder.name, dir=run.local, config=dict(run.config)
        )
        run.save_id(FILE, self._run.id)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the finite values of a step."""
        self._run.log({"step": step, **finite(values)})

    def text(self, step: int, tag: str, text: str) -> None:
        """Logs Markdown as an HTML panel."""
        self._run.log({"step": step, tag: self._wandb.Html(f"<pre>{text}</pre>")})

    def flush(self) -> None:
        """Does nothing: W&B sends its records in a process of its own."""

    def close(self) -> None:
        """Sends the last records and ends the run."""
        self._run.finish()
