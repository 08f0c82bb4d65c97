"""The protocol of a benchmark worker: a line in, one timed call and a JSON line out; and what it ran on."""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def serve(call: Callable[[], float]) -> None:
    """Times `call()` once for each line on stdin; a JSON line `{seconds, cpu_s, loss, rss_mb}` answers it.

    The peak of resident memory is that since loading was done: what loading left is given back first.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is not an answer
    print(json.dumps({"ready": True}), file=answer, flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"seconds": wall, "cpu_s": cpu, "loss": loss, "rss_mb": peak_mb()}), file=answer, flush=True)


def peak_mb() -> float:
    """The peak of this process's resident memory since it was last reset, in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def machine(*packages: str) -> dict[str, Any]:
    """The machine, how busy it is, and the versions of `packages`."""
    from lowrank.core.processor import processor_name  # here, as a peer's environment may lack what the package imports

    versions = {name: metadata.version(name) for name in packages}
    return {
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "load": os.getloadavg(),
        **versions,
    }
