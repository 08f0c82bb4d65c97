"""The protocol of a logger: a sink for the numbers and texts of a run, beside `metrics.jsonl`."""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from lowrank.core.errors import UserError
from lowrank.core.files import read_json, write_json
from lowrank.core.paths import AnyPath, exists


class Logger(Protocol):
    """A sink that process 0 writes to; every method may raise OSError when its files cannot be written."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step; values that are not finite are left out."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Records Markdown under `tag`."""

    def flush(self) -> None:
        """Writes to disk, or sends, the records that are still in memory."""

    def close(self) -> None:
        """Flushes, and ends the record of the run."""


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """The facts about a run that a logger is made from."""

    folder: AnyPath  # of the run
    start: int  # the step that the run resumes from; 0 for a new run
    config: Mapping[str, Any]
    mirror: Path | None = None  # a local folder whose files are copied to a run's folder in a bucket

    @property
    def local(self) -> Path:
        """The local folder for files that grow."""
        return self.mirror or self.folder

    def saved_id(self, file: str) -> str | None:
        """The id that `save_id` wrote to the folder when the run began, if this is a resumed run; else None."""
        path = self.folder / file
        return read_json(path)["id"] if self.start and exists(path) else None

    def save_id(self, file: str, id_: str) -> None:
        """Writes the id that a logger's server gave the run, for a resumed run to continue it."""
        write_json(self.folder / file, {"id": id_})


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The finite values, which are the values that can be drawn."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def import_extra(module: str) -> ModuleType:
    """The module of an optional package. Raises UserError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        advice = f"install it with pip install 'lowrank[{module}]', or leave {module} out of loggers"
        raise UserError(f"the logger {module!r} needs the package {module}: {advice}") from None
