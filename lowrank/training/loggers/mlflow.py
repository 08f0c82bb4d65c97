"""MLflow: a run of the active experiment, which a resumed run continues.

The tracking server is the one that MLflow is configured for; without one, the records go to `mlflow.db` in the folder
of the run.
"""

import time
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.paths import AnyPath, in_bucket
from lowrank.training.loggers.logger import LoggedRun, finite, import_extra

FILE = "mlflow_run.json"  # in the run's folder: the id of the MLflow run


class MLflow:
    """An MLflow run that is written through a client, without MLflow's global state."""

    def __init__(self, run: LoggedRun):
        mlflow = import_extra("mlflow")
        local = not mlflow.is_tracking_uri_set()
        if local and in_bucket(run.folder):
            raise UserError(f"the logger 'mlflow' cannot keep a database in {run.folder}: set MLFLOW_TRACKING_URI")
        uri = f"sqlite:///{run.folder.absolute() / 'mlflow.db'}" if local else None
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        self._metric = mlflow.entities.Metric
        known = run.saved_id(FILE)
        self._id = known or self._create_run(run.folder, local)
        run.save_id(FILE, self._id)
        if not known:
            self._client.log_dict(self._id, dict(run.config), "config.json")

    def _create_run(self, folder: AnyPath, local: bool) -> str:
        """The id of a new run; a local one keeps its files in the run's folder, not in the working directory."""
        experiment = "0"  # MLflow's default
        if local:
            files = (folder.absolute() / "mlflow_files").as_uri()
            experiment = self._client.create_experiment(folder.name, artifact_location=files)
        return self._client.create_run(experiment, run_name=folder.name).info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the finite values of a step in one request."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(k, v, now, int(step)) for k, v in finite(values).items()])

    def text(self, step: int, tag: str, text: str) -> None:
        """Logs Markdown as a file of the run."""
        self._client.log_text(self._id, text, f"{tag}/{step}.md")

    def flush(self) -> None:
        """Does nothing: each request is written when it is made."""

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._id)
