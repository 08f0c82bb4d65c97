"""The engine `local`: workers as processes of this machine, each with its share of the cores or accelerators.

--workers=2          the number of workers; by default one for each of --devices, or one
--devices=0,1,2,3    the indices of the accelerators, of which each worker sees its share
"""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch import worker
from launch.live_table import LiveTable
from lowrank.core.errors import UserError
from lowrank.core.exit_codes import STOPPED
from lowrank.core.paths import in_bucket
from lowrank.sweeps.folder import StudyFolder
from lowrank.sweeps.outputs import write_outputs
from lowrank.sweeps.status import Status

POLL = 0.5  # seconds between two looks at the folder
CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}  # the layout of the TPU chips that one process takes
RESTARTS = 3  # how often a worker is started again that a signal has killed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this engine."""
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--devices", default="", help=argparse.SUPPRESS)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not fit."""
    devices = _devices(args)
    if not all(device.isdecimal() for device in devices):
        raise UserError(f"--devices={args.devices} is not a list of indices such as 0,1,2,3")
    count, of = args.workers or len(devices) or 1, len(devices) or len(_cores())
    if args.workers < 0 or count > of:
        kind = "--devices" if devices else "cores"
        raise UserError(f"--workers={args.workers} is not between 1 and the {of} {kind} that they share")


def _devices(args: argparse.Namespace) -> list[str]:
    return args.devices.split(",") if args.devices else []


def _cores() -> list[str]:
    """The cores that this process may use."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return [str(core) for core in sorted(cores)]


def _shares(items: Sequence[str], count: int) -> list[str]:
    """`count` parts of about one size, each a list with commas."""
    return [",".join(items[i * len(items) // count : (i + 1) * len(items) // count]) for i in range(count)]


class Workers:
    """The processes of the workers. A first signal asks them to stop, which lets their cells save; a second kills."""

    def __init__(self, study: StudyFolder, args: argparse.Namespace):
        """Describes the workers' commands; `start` starts them."""
        devices, cores = _devices(args), _cores()
        count = args.workers or len(devices) or 1
        pinned = count > 1 and hasattr(os, "sched_setaffinity")
        flags = [[f"--cores={share}"] if pinned and share else [] for share in _shares(cores, count)]
        self._commands = [[*worker.worker_command(study.path), *flag] for flag in flags]
        self._environments = [_environment(share) for share in _shares(devices, count)]
        logs = tempfile.mkdtemp(prefix="lowrank-") if in_bucket(study.path) else study.path / "logs"
        self._logs = [Path(logs) / f"local-{i}.txt" for i in range(count)]
        self._restarts, self.stopping = [RESTARTS] * count, False
        self._processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Starts every worker."""
        self._processes = [self._start(i) for i in range(len(self._commands))]

    def _start(self, i: int) -> subprocess.Popen:
        self._logs[i].parent.mkdir(parents=True, exist_ok=True)
        with open(self._logs[i], "a") as log:
            return subprocess.Popen(
                self._commands[i],
                env=self._environments[i],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Asks the workers to stop, and kills them when it is called again."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True

    def kill(self) -> None:
        """Kills the workers that still run."""
        for process in self._processes:
            process.kill()
            process.wait()

    def alive(self) -> bool:
        """Whether a worker runs; one that a signal has killed is started again a few times."""
        for i, process in enumerate(self._processes):
            if (process.poll() or 0) < 0 and self._restarts[i] and not self.stopping:
                self._restarts[i] -= 1
                self._processes[i] = self._start(i)
        return any(process.poll() is None for process in self._processes)

    def endings(self) -> list[str]:
        """A line for each worker that has ended in a way that it should not."""
        codes = [process.poll() for process in self._processes]
        return [
            f"worker {i} ended with code {code}: see {log}"
            for i, (code, log) in enumerate(zip(codes, self._logs, strict=True))
            if code not in (None, 0, STOPPED)
        ]


def _environment(devices: str) -> dict[str, str]:
    """The environment of a worker that sees these accelerators alone, or all of them if none are named."""
    if not devices:
        return dict(os.environ)
    bounds = CHIP_BOUNDS.get(len(devices.split(",")))
    chips = {"TPU_CHIPS_PER_PROCESS_BOUNDS": bounds, "TPU_PROCESS_BOUNDS": "1,1,1"} if bounds else {}
    return {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "TPU_VISIBLE_CHIPS": devices, **chips}


def run(study: StudyFolder, args: argparse.Namespace) -> int:
    """Runs the study to its end; returns 0 if every cell is done, 1 if some failed, 42 if it was stopped."""
    workers, status = Workers(study, args), Status(study)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, workers.stop) for number in numbers}
    try:
        with LiveTable() as table:
            workers.start()
            while workers.alive():
                time.sleep(POLL)
                status.update()
                table.show(status)
            for line in workers.endings():
                table.say(f"error: {line}")
        stopped = workers.stopping
    finally:
        workers.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    return finish(status, stopped)


def finish(status: Status, stopped: bool) -> int:
    """Writes the tables, prints the state of every cell, and returns the exit code of the command."""
    status.update()
    paths = write_outputs(status.study, status.results)
    print(status.text())
    print("\ntables:", ", ".join(map(str, paths)))
    if status.finished:
        return 0 if set(status.counts) <= {"done", "pruned"} else 1
    print("the same command continues")
    return STOPPED if stopped else 1
