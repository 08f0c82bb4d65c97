"""Pages in headless Chromium, driven by ChromeDriver: what a reader sees once the scripts have run."""

import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
SECONDS = 60  # the longest wait for a page, on a machine with other work


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
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


class Browser:
    """One tab."""

    def __init__(self, session: str):
        self.session = session

    def open(self, address: str) -> list[str]:
        """Load the page; returns what its console complains of."""
        _send(f"{self.session}/url", {"url": address})
        lines = _send(f"{self.session}/se/log", {"type": "browser"})
        return [line["message"] for line in lines if line["level"] in ("WARNING", "SEVERE")]

    def run(self, script: str) -> Any:
        """The value that `script`, the body of a function in JavaScript, returns."""
        return _send(f"{self.session}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str) -> Any:
        """The first value of `script` that JavaScript takes for true."""
        give_up = time.monotonic() + SECONDS
        while not (value := self.run(script)):
            assert time.monotonic() < give_up, f"{script!r} stayed {value!r} for {SECONDS} s"
            time.sleep(0.1)
        return value


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """A browser with an empty profile, closed after the block."""
    with tempfile.TemporaryDirectory() as profile:
        words = [shutil.which("chromedriver") or "chromedriver", "--port=0"]
        driver = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            started = next(line for line in driver.stdout if "started successfully on port" in line)
            address = f"http://127.0.0.1:{started.split()[-1].rstrip('.')}"
            chromium = {"binary": shutil.which("chromium"), "args": [*OPTIONS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": chromium, "goog:loggingPrefs": {"browser": "ALL"}}
            session = _send(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            yield Browser(f"{address}/session/{session}")
            _send(f"{address}/session/{session}", None, "DELETE")
        finally:
            driver.terminate()
            driver.wait()
            driver.stdout.close()


def _send(address: str, body: Any, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=2 * SECONDS) as answer:
        return json.load(answer)["value"]
