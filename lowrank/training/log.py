"""The log of a run: `metrics.jsonl`, a progress bar, and loggers such as TensorBoard."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax

from lowrank.core.errors import UserError
from lowrank.core.files import to_json, write_text
from lowrank.core.mirror import Mirror
from lowrank.core.paths import PathLike, as_path, exists, read_text
from lowrank.training.loggers import LOGGERS, LoggedRun
from lowrank.training.progress import Clock, Progress

METRICS = "metrics.jsonl"
COPY_SECONDS = 10.0  # the time between two copies to a bucket of a log that grows
LOSS = "train/loss"  # a line that holds it moves the progress bar


class RunLog:
    """The log of one run, a context manager. Only process 0 writes; on the others every method does nothing."""

    def __init__(
        self,
        workdir: PathLike,
        total_steps: int,
        *,
        start: int = 0,
        tokens_per_step: float = 0,
        every_seconds: float = 30.0,
        stream: TextIO | None = None,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the log of a run that continues after step `start`; the lines of later steps are deleted.

        Args:
          workdir: the folder of the run, which holds `metrics.jsonl` and the files of the loggers.
          total_steps: the number of steps at which the run ends.
          start: the step that the run resumes from; 0 for a new run.
          tokens_per_step: the tokens of all processes together; 0 omits tokens/s.
          every_seconds: the seconds between printed lines where `stream` is not a terminal.
          stream: the stream that progress is printed to; standard error by default.
          loggers: names of `LOGGERS`.
          config: the config of the run, for loggers that keep it.

        Raises:
          UserError: the folder cannot be written, or `metrics.jsonl` has a line that is not JSON.
        """
        self._writes = jax.process_index() == 0
        self._clock = Clock(tokens_per_step, start)
        if not self._writes:
            return
        self._path = as_path(workdir) / METRICS
        self._mirror = Mirror(workdir)
        earlier, self._clock.seconds_before = _earlier_lines(self._path, start)
        self._progress = Progress(total_steps, start, every_seconds, stream or sys.stderr)
        with _write_errors(self._path.parent):
            file = write_text(self._mirror.local / METRICS, earlier)
            self._mirror.copy()
            self._lines = open(file, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
            facts = LoggedRun(self._path.parent, start, to_json(config or {}), self._mirror.local)
            self._loggers = [LOGGERS[name](facts) for name in loggers]

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():  # the first error is the cause
            self.close()

    @property
    def seconds(self) -> float:
        """The wall seconds of the run so far, including those before a resume."""
        return self._clock.seconds()

    @property
    def tokens_per_s(self) -> float | None:
        """The mean tokens per second since the first logged loss, hence without compilation and without pauses."""
        return self._clock.mean

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends `{step, seconds, **values}` to `metrics.jsonl`, and the values to the loggers.

        The values are Python, NumPy or JAX scalars; the call waits until a JAX scalar is computed. A line with
        `train/loss` moves the progress bar and gets `train/tokens_per_s`, measured since the previous such line. NaN
        and infinities are written as the strings "NaN", "Infinity" and "-Infinity", which `read_metrics` converts back.
        """
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        if LOSS in values:
            rate = self._clock.lap(step)
            values |= {} if rate is None else {"train/tokens_per_s": rate}
            self._progress.show(step, values[LOSS], rate)
        line = {"step": int(step), "seconds": round(self.seconds, 3), **values}
        with _write_errors(self._path):
            self._lines.write(json.dumps(to_json(line), allow_nan=False) + "\n")
            self._lines.flush()
            for logger in self._loggers:
                logger.scalars(step, values)
            self._mirror.copy(COPY_SECONDS)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Sends Markdown, such as samples, to the loggers under `tag`."""
        if self._writes:
            with _write_errors(self._path):
                for logger in self._loggers:
                    logger.text(step, tag, text)

    def say(self, text: str) -> None:
        """Prints `text` above the progress bar."""
        if self._writes:
            self._progress.say(text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count in tokens/s: `with log.paused(): evaluate()`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._clock.skip(time.monotonic() - started)

    def flush(self) -> None:
        """Writes the records that are still in memory to the files."""
        if self._writes:
            with _write_errors(self._path):
                for logger in self._loggers:
                    logger.flush()
                self._mirror.copy()

    def close(self) -> None:
        """Flushes and closes the files and the bar. A second call does nothing."""
        if self._writes:
            self._writes = False
            with _write_errors(self._path), contextlib.ExitStack() as stack:
                stack.callback(self._progress.close)
                stack.callback(self._mirror.copy)
                stack.callback(self._lines.close)
                for logger in self._loggers:
                    stack.callback(logger.close)


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, each `{"step": int, "seconds": float, name: float, ...}`.

    A last line that a crash cut short is omitted. Raises UserError for any other line that is not JSON.
    """
    out, lines = [], read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        try:
            out.append({k: float(v) if isinstance(v, str) else v for k, v in json.loads(line).items()})
        except (ValueError, AttributeError):
            if number < len(lines):  # every complete line ends in a newline
                fault = f"{path} line {number} is not a JSON object of metrics: {line[:80]!r}"
                raise UserError(f"{fault}; delete the line, or choose another workdir") from None
    return out


def _earlier_lines(path: PathLike, start: int) -> tuple[str, float]:
    """The lines up to step `start` (none for 0), and the seconds of the last one."""
    lines = [line for line in read_metrics(path) if line["step"] <= start] if start and exists(path) else []
    text = "".join(json.dumps(to_json(line), allow_nan=False) + "\n" for line in lines)
    return text, lines[-1]["seconds"] if lines else 0.0


@contextlib.contextmanager
def _write_errors(path: PathLike) -> Iterator[None]:
    """Raises a UserError that names the log where the file system refuses a write."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write the log at {path}: {e.strerror or e}") from e
