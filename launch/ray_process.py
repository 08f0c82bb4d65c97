"""An actor of Ray: one process of a worker on one of its hosts.

Ray imports this module on every host, so that it imports nothing but the standard library.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

WORKER_ID = "ray.io/tpu-worker-id"  # Ray's label with the index of a host in its TPU slice


class Process:
    """A process on the host where Ray has placed it. It dies with the actor where the host has `setpriv`."""

    def place(self) -> tuple[str, int | None]:
        """A free address of this host, and its index in its TPU slice if Ray knows one."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        index = ray.get_runtime_context().get_node_labels().get(WORKER_ID)
        return f"{ray.util.get_node_ip_address()}:{port}", None if index is None else int(index)

    def start(self, name: str, words: Sequence[str], environment: Mapping[str, str]) -> str:
        """Starts a command, whose first word is `python`, under this Python; returns the path of its log."""
        bound = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        descriptor, self._log = tempfile.mkstemp(prefix=f"{name}-", suffix=".txt")
        self._process = subprocess.Popen(
            [*bound, sys.executable, *words[1:]],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(descriptor)
        return self._log

    def poll(self) -> int | None:
        """The exit code, or None while the process runs; a signal's number is negative."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks the process to save and end."""
        self._process.terminate()

    def kill(self) -> None:
        """Kills the process; so do what it has started, which die with it."""
        self._process.kill()
        self._process.wait()

    def last_line(self) -> str:
        """The last line that the process has written."""
        lines = Path(self._log).read_text(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it has written nothing")
