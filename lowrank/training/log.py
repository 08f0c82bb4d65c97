"""The log of a run: `metrics.jsonl`, a progress bar, and loggers such as TensorBoard."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from lowrank.core.errors import UserError
from lowrank.core.files import to_json, write_text
from lowrank.training.loggers import LOGGERS, LoggedRun
from lowrank.training.progress import Clock, Progress

METRICS = "metrics.jsonl"
LOSS = "train/loss"  # a line that holds it moves the progress bar


class RunLog:
    """The log of one run, a context manager. Only process 0 writes; on the others every method does nothing."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        total_steps: int,
        *,
        start: int = 0,
        tokens_per_step: float = 0,
        every_seconds: float = 30.0,
        stream: TextIO | None = None,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the log of a run that goes on after step `start`; what was logged beyond that step is dropped.

        Args:
          workdir: the folder of the run, which holds `metrics.jsonl` and the files of the loggers.
          total_steps: the step the run ends at.
          start: the step it resumes from; 0 starts over.
          tokens_per_step: of all processes together; 0 leaves tokens/s out.
          every_seconds: how often a line is printed where `stream` is not a terminal.
          stream: where progress goes; standard error by default.
          loggers: names of `LOGGERS`.
          config: the config of the run, for loggers that keep it.

        Raises:
          UserError: the folder cannot be written, or `metrics.jsonl` has a line that is not JSON.
        """
        self._writes = jax.process_index() == 0
        self._clock = Clock(tokens_per_step, start)
        if not self._writes:
            return
        workdir = Path(workdir)
        self._clock.seconds_before = _rewind(workdir / METRICS, start)
        self._progress = Progress(total_steps, start, every_seconds, stream or sys.stderr)
        with _one_line(workdir):
            self._lines = open(workdir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
            facts = LoggedRun(workdir, start, to_json(config or {}))
            self._loggers = [LOGGERS[name](facts) for name in loggers]

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():  # the first error is the cause
            self.close()

    @property
    def seconds(self) -> float:
        """Wall seconds of the run so far, those before a restart included."""
        return self._clock.seconds()

    @property
    def tokens_per_s(self) -> float | None:
        """Mean tokens per second since the first logged loss (so without compilation), pauses left out."""
        return self._clock.mean

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends `{step, seconds, **values}` to `metrics.jsonl`, and the values to the loggers.

        Values are Python, NumPy or JAX scalars; reading a JAX one waits for it. A line with `train/loss` moves the
        progress bar and gets `train/tokens_per_s`, measured since the last such line. NaN and infinities are
        written as the strings "NaN", "Infinity", "-Infinity"; `read_metrics` turns them back.
        """
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        if LOSS in values:
            rate = self._clock.lap(step)
            values |= {} if rate is None else {"train/tokens_per_s": rate}
            self._progress.show(step, values[LOSS], rate)
        line = {"step": int(step), "seconds": round(self.seconds, 3), **values}
        with _one_line(Path(self._lines.name)):
            self._lines.write(json.dumps(to_json(line), allow_nan=False) + "\n")
            self._lines.flush()
            for logger in self._loggers:
                logger.scalars(step, values)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Sends Markdown to the loggers under `tag`: the config, samples."""
        if self._writes:
            with _one_line(Path(self._lines.name)):
                for logger in self._loggers:
                    logger.text(step, tag, text)

    def say(self, text: str) -> None:
        """Prints `text` without breaking the progress bar."""
        if self._writes:
            self._progress.say(text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """`with log.paused(): evaluate()`: the time inside does not count against tokens/s."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._clock.skip(time.monotonic() - started)

    def flush(self) -> None:
        """Writes to the files what is still in memory."""
        if self._writes:
            with _one_line(Path(self._lines.name)):
                for logger in self._loggers:
                    logger.flush()

    def close(self) -> None:
        """Flushes and closes the files and the bar; more than once does no harm."""
        if self._writes:
            self._writes = False
            with _one_line(Path(self._lines.name)), contextlib.ExitStack() as stack:
                stack.callback(self._progress.close)
                stack.callback(self._lines.close)
                for logger in self._loggers:
                    stack.callback(logger.close)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, each `{"step": int, "seconds": float, name: float, ...}`.

    A last line that a crash cut short is left out; any other line that is not JSON raises UserError naming it.
    """
    path, out = Path(path), []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            out.append({k: float(v) if isinstance(v, str) else v for k, v in json.loads(line).items()})
        except (ValueError, AttributeError):
            if number < len(lines):  # every complete line ends in a newline
                raise UserError(f"{path} line {number} is not a metrics line: {line[:80]!r}") from None
    return out


def _rewind(path: Path, start: int) -> float:
    """Drops the lines after step `start` (all of them for 0); returns the seconds of the last one kept."""
    kept = [line for line in read_metrics(path) if line["step"] <= start] if start and path.exists() else []
    write_text(path, "".join(json.dumps(to_json(line), allow_nan=False) + "\n" for line in kept))
    return kept[-1]["seconds"] if kept else 0.0


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write the log at {path}: {e.strerror or e}") from e
