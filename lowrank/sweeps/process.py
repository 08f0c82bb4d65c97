"""The process of a cell: it writes to a log, is asked to stop before it is killed, and ends with its worker."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

GRACE = 30.0  # seconds in which a process that is asked to stop may save
TAIL = 4096  # bytes of a log that are read for its last line


class CellProcess:
    """A command that writes to a log file. Use it as a context, which kills what is left of it at its end."""

    def __init__(self, command: Sequence[str], log: Path, grace: float = GRACE):
        """Starts the command. Where `setpriv` exists, the system kills it when this process dies."""
        log.parent.mkdir(parents=True, exist_ok=True)
        bound = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        self.log, self._grace, self._kill_at = log, grace, float("inf")
        self._began = self._heard = time.monotonic()
        self._size = 0
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [*bound, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C on the terminal reaches the worker alone
            )

    def __enter__(self) -> "CellProcess":
        return self

    def __exit__(self, *unused: object) -> None:
        self.kill()

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._began

    def poll(self) -> int | None:
        """The exit code, or None while it runs; a signal's number is negative. What ignores a stop is killed."""
        code = self._process.poll()
        if code is None and time.monotonic() > self._kill_at:
            self.kill()
            code = self._process.poll()
        return code

    def silent_seconds(self) -> float:
        """The seconds since the log last grew, as far as calls of this method have seen it."""
        size = self.log.stat().st_size
        if size != self._size:
            self._size, self._heard = size, time.monotonic()
        return time.monotonic() - self._heard

    def stop(self) -> None:
        """Asks the process to save and end; after the grace, `poll` kills it. A second call does nothing."""
        if self._kill_at == float("inf") and self._process.poll() is None:
            self._kill_at = time.monotonic() + self._grace
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the process and those that it has started in its session, at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_line(self) -> str:
        """The last line that the process has written."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it has written nothing")
