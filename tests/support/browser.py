"""Pages in headless Chromium: what a reader sees after the scripts have run, and what the console said."""

import contextlib
import functools
import http.server
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

SLOW = "/slow.png"  # an image that comes late: a page that holds it is dumped only then
SECONDS = 6

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    "--dump-dom",
)


@contextlib.contextmanager
def served(folder: Path, pages: Mapping[str, str] | None = None):
    """The address at which the files of `folder` are served while the block runs, and `pages`: `{path: HTML}`."""
    handler = functools.partial(_Handler, pages or {}, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, pages, *args, **kwargs):
        self.pages = pages
        super().__init__(*args, **kwargs)

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == SLOW:
            time.sleep(SECONDS)
        if self.path not in (SLOW, *self.pages):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.pages.get(self.path, "").encode())


def open_page(address: str, real_time: bool = False) -> tuple[str, list[str]]:
    """The page's HTML after its scripts have run, and the lines of its console.

    Ten seconds of its clock pass at once; a worker has a clock of its own, and needs `real_time` and an image SLOW.
    """
    clock = [] if real_time else ["--virtual-time-budget=10000"]
    with tempfile.TemporaryDirectory() as profile:
        words = ["chromium", *OPTIONS, *clock, f"--user-data-dir={profile}", address]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
