"""A worker of several processes, one on each host of its slices: the first claims the cells, and the others follow it.

The first process is a `Worker`. Before each run it announces the cell in the study's folder, and every other process of
the group starts the same run, which joins the first one's by `jax.distributed`. An announcement replaces the one
before it, and whatever a follower still runs of that one is ended.
"""

import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.exit_codes import STOPPED
from lowrank.core.files import read_json, write_json
from lowrank.core.paths import AnyPath, exists
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.claims import Ledger
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.process import CellProcess
from lowrank.sweeps.worker import Command, Worker

FOLDER = "groups"  # of a study
POLL = 2.0  # seconds between two looks at the announcement
TOGETHER = "--config.distributed=True"


def announcement_path(study: StudyFolder, group: str) -> AnyPath:
    """The file with the cell that a group runs."""
    return study.path / FOLDER / f"{group}.json"


def lead(study: StudyFolder, group: str, run_command: Command, say: Callable[[str], None], **options: Any) -> int:
    """Claims and runs cells as `Worker.run`, with a group's other processes; returns its exit code.

    `options` are those of `Worker`.
    """
    path = announcement_path(study, group)

    def announce(key: str | None, end: int | None = None) -> None:
        write_json(path, {"id": uuid.uuid4().hex, "key": key, "end": end})

    def announced_command(study: StudyFolder, cell: Cell) -> Sequence[str]:
        announce(cell.key)
        return [*run_command(study, cell), TOGETHER]

    announce(None)  # what followers find of an earlier start is over
    code = Worker(study, announced_command, say, **options).run()
    announce(None, end=code)
    return code


class Follower:
    """A process of a group that runs what its first process announces."""

    def __init__(
        self, study: StudyFolder, group: str, index: int, run_command: Command, say: Callable[[str], None] = print
    ):
        """The process with an index from 1 on. `say` prints a line."""
        self._study, self._run_command, self._say = study, run_command, say
        self._path, self._index = announcement_path(study, group), index
        self._stopping = False

    def run(self, poll: float = POLL) -> int:
        """Follows until the group's first process ends; returns its exit code, or 42 after SIGTERM or SIGINT."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            last = self._read()
            if last.get("end") is None or self._is_over():
                last = {}
            while not self._stopping:
                found = self._read()
                if found.get("end") is not None and found != last:
                    return int(found["end"])
                if found.get("key") and found != last:
                    self._follow(found, poll)
                last = found
                time.sleep(poll)
            return STOPPED
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _is_over(self) -> bool:
        """Whether no cell is left, so that an end that is announced is not of an earlier start."""
        keys = [cell.key for cell in self._study.cells]
        histories = Ledger(self._study.path, self._study.limits).histories(keys)
        return all(history.is_final(self._study.limits) for history in histories.values())

    def _note(self, number: int, frame: Any) -> None:
        self._stopping = True

    def _read(self) -> dict[str, Any]:
        """The announcement, or an empty one. A store that does not answer is asked again later."""
        try:
            return read_json(self._path) if exists(self._path) else {}
        except (OSError, UserError) as e:
            self._say(f"the announcement cannot be read: {e}")
            return {}

    def _follow(self, announcement: dict[str, Any], poll: float) -> None:
        """Runs a cell beside the first process until the run ends or the next announcement comes."""
        cell = next(cell for cell in self._study.cells if cell.key == announcement["key"])
        self._say(f"{cell.key} starts: {cell.label}")
        log = Path(tempfile.gettempdir()) / f"{self._path.stem}-{self._index}-{cell.key}.txt"
        words = [*self._run_command(self._study, cell), TOGETHER]
        with CellProcess(words, log) as process:
            while process.poll() is None:
                found = self._read()
                if found and found != announcement:
                    break
                if self._stopping:
                    process.stop()
                time.sleep(poll)
            if process.poll():
                self._say(f"{cell.key} ended with exit code {process.poll()}: {process.last_line()}; see {log}")
