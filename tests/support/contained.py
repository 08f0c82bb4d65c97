"""Bounds around what reads a broken file: its time, its memory, its warnings, and the files that it touches."""

import contextlib
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

SECONDS, BYTES = 5.0, 2**30
HANG = {signal.ITIMER_PROF: 30.0, signal.ITIMER_REAL: 300.0}  # seconds of the processor, and of a clock
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watch: list[tuple[Path, list[str]]] = []  # the folder that is read, and what was touched outside of it


def _audit(event: str, args: tuple) -> None:
    if _watch and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"):
        folder, touched = _watch[-1]
        if isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = event != "open" or bool((args[2] or 0) & WRITING)
            ours = path.startswith(str(folder) + os.sep)
            if not ours and path != os.devnull and (writes or path.startswith(str(folder.parent) + os.sep)):
                touched.append(f"{event} {path}")


@contextlib.contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Fails if the block takes more than SECONDS of the processor or BYTES, warns, writes, or reads beside `folder`."""
    if not getattr(_audit, "hooked", False):
        sys.addaudithook(_audit)
        _audit.hooked = True
    touched: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before = {number: signal.signal(number, _hangs) for number in (signal.SIGALRM, signal.SIGPROF)}
    _watch.append((folder.resolve(), touched))
    start = time.process_time()
    try:
        for timer, seconds in HANG.items():
            signal.setitimer(timer, seconds)
        resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, limits[1]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for timer in HANG:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        _watch.pop()
    took = time.process_time() - start
    assert took <= SECONDS, f"it took {took:.1f} s"
    assert not touched, f"outside the folder: {touched}"


def _hangs(*_: object) -> None:
    raise AssertionError(f"it hangs: {HANG}")
