"""Pages in headless Chromium: what a reader sees after the scripts have run, and what the console said."""

import contextlib
import functools
import http.server
import subprocess
import tempfile
import threading
from pathlib import Path

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    *("--virtual-time-budget=10000", "--dump-dom"),
)


@contextlib.contextmanager
def served(folder: Path):
    """The address at which the files of `folder` are served while the block runs."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def open_page(address: str) -> tuple[str, list[str]]:
    """The page's HTML after its scripts have run, and the lines of its console."""
    with tempfile.TemporaryDirectory() as profile:
        words = ["chromium", *OPTIONS, f"--user-data-dir={profile}", address]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
