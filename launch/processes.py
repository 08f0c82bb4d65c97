"""The processes of one run: how each of them finds the others, and a launcher that starts several on one machine.

JAX finds them on TPU pods, on GKE, under Slurm and under Open MPI. Elsewhere the flags name them, or the environment
variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from lowrank.core.errors import UserError
from lowrank.core.exit_codes import STOPPED

ADDRESS, COUNT, INDEX = "coordinator_address", "num_processes", "process_id"  # of jax.distributed.initialize
VARIABLES = {name: f"JAX_{name.upper()}" for name in (ADDRESS, COUNT, INDEX)}
GRACE = 10.0  # seconds in which the other processes may end by themselves after one has failed

flags.DEFINE_string(ADDRESS, None, "HOST:PORT of process 0.")
flags.DEFINE_integer(COUNT, None, "The number of processes of the run.", lower_bound=1)
flags.DEFINE_integer(INDEX, None, "The index of this process, from 0.", lower_bound=0)
_LOCAL = flags.DEFINE_integer("local_processes", 0, "Starts so many processes on this machine.", lower_bound=0)


def launched() -> int | None:
    """The exit code of the run's processes if this one is their launcher (`--local_processes`), else None."""
    if not _LOCAL.value or VARIABLES[INDEX] in os.environ:
        return None
    return run_locally(_LOCAL.value, [sys.executable, "-m", "launch.main", *sys.argv[1:]])


def connect(distributed: bool) -> None:
    """Joins the other processes, if the flags or the environment count them, or if the run is `distributed`.

    It must come before the first use of a device. Raises UserError for arguments that are missing or do not fit, and
    for processes that cannot be found.
    """
    given = {name: value for name in VARIABLES if (value := _argument(name)) is not None}
    if COUNT in given or INDEX in given:
        _check(given)
    elif not distributed:
        return
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as e:
        raise UserError(f"the processes of this run cannot be found: {e}") from None


def _argument(name: str) -> Any:
    """The value of a flag, or else of its environment variable, or None."""
    text = os.environ.get(VARIABLES[name])
    if (value := flags.FLAGS[name].value) is not None or text is None or name == ADDRESS:
        return text if value is None else value
    if not text.isdecimal():
        raise UserError(f"{VARIABLES[name]}={text} is not a number from 0 on")
    return int(text)


def _check(given: dict[str, Any]) -> None:
    for name in VARIABLES:
        if name not in given:
            raise UserError(
                f"--{name} is missing, and {VARIABLES[name]} is not set: give all of {', '.join(VARIABLES)}"
            )
    if not 0 <= given[INDEX] < given[COUNT]:
        raise UserError(f"--{INDEX}={given[INDEX]} is not an index of --{COUNT}={given[COUNT]}: count from 0")


def run_locally(count: int, words: Sequence[str]) -> int:
    """Runs a command as `count` processes of one run, and returns their exit code.

    SIGTERM and SIGINT go to process 0, which stops all of them at the same step. If a process fails, it is named on
    stderr and the others are ended; a process that a signal has killed gives 128 and the signal's number.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {VARIABLES[ADDRESS]: f"localhost:{free.getsockname()[1]}", VARIABLES[COUNT]: str(count)}
    processes: list[subprocess.Popen] = []
    stop = lambda *unused: [process.send_signal(signal.SIGTERM) for process in processes[:1]]  # noqa: E731
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for i in range(count):
            environment = {**os.environ, **shared, VARIABLES[INDEX]: str(i)}
            processes.append(subprocess.Popen(words, env=environment, start_new_session=True))
        return _watch(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[subprocess.Popen]) -> int:
    """The exit code of the first process that fails, or of all; the others have `GRACE` to end after it."""
    fine, give_up = (None, 0, STOPPED), float("inf")
    codes: list[int | None] = [None]
    while None in codes and time.monotonic() < give_up:
        time.sleep(0.05)
        codes = [process.poll() for process in processes]
        failed = [i for i, code in enumerate(codes) if code not in fine]
        if failed and give_up == float("inf"):
            give_up = time.monotonic() + GRACE
            first = min(failed, key=lambda i: codes[i] == -signal.SIGABRT)  # others abort when process 0 is gone
            found = f"process {first} of {len(processes)} {_ending(processes[first].returncode)}"
            print(f"error: {found}; the others are ended", file=sys.stderr)
    if give_up == float("inf"):
        return max(process.returncode for process in processes)
    code = processes[first].returncode
    return code if code > 0 else 128 - code


def _ending(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
