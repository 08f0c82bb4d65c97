"""TensorBoard: event files in the folder `tensorboard` of the run, written without TensorFlow or PyTorch."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank.training.loggers.logger import LoggedRun, finite


class TensorBoard:
    """Event files that tensorboardX writes in this thread, as its own queue hangs forever on a full disk."""

    def __init__(self, run: LoggedRun):
        directory, start = run.local / "tensorboard", run.start
        with hidden("torch"):
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        self._summary, self._pb = summary, event_pb2
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(directory / "events"), f".{start}.{os.getpid()}")
        began = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides the events after `start`
        self._event(start + 1 if start else 0, session_log=began)
        self._flushed = time.monotonic()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the finite values of a step."""
        for name, value in finite(values).items():  # tensorboardX warns of other values
            self._event(step, summary=self._summary.scalar(name, value))
        if time.monotonic() - self._flushed > 10:
            self.flush()

    def flush(self) -> None:
        """Writes the events that are still in memory to the file."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def text(self, step: int, tag: str, text: str) -> None:
        """Writes Markdown under `tag`."""
        self._event(step, summary=self._summary.text(tag, text))

    def _event(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._pb.Event(wall_time=time.time(), step=int(step), **what))

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Makes an import of `module` fail: tensorboardX imports PyTorch if it can, which takes seconds and much memory."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # an import then raises ImportError
    try:
        yield
    finally:
        del sys.modules[module]
