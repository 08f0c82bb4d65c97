"""The adapter that a run has written."""

from lowrank.core import schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import RunConfig
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.training import loop, workdir


def adapter_of_run(directory: PathLike) -> tuple[AnyPath, str]:
    """`(folder of the adapter, name of its model)`. Raises UserError for a folder that is not that of a run."""
    try:
        model = schema.decode(as_path(directory) / workdir.CONFIG, RunConfig)["model"]["name"]
    except UserError as e:
        raise UserError(f"{directory} is not the folder of a run: {e}") from None
    return as_path(directory) / loop.ADAPTER, model
