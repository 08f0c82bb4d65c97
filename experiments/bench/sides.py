"""The sides of a benchmark: processes that load once and then take turns, one step per turn."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ROWS, LENGTH = 4, 128  # of the batch of a step
WARMUP = 2  # the number of turns that do not count
PAUSE = 0.5  # seconds between turns: torch's threads spin for a while after a step, and would slow the next one
# Huge pages spare the CPU's TLB, as the README advises on a CPU; they do not make torch faster.
OURS_ENV = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Asked(NamedTuple):
    """A worker: `main(**arguments)` of a module of this package."""

    module: str
    env: Mapping[str, str]
    arguments: Mapping[str, Any]
    python: str = sys.executable


class Side:
    """A worker process that runs one step per request."""

    def __init__(self, asked: Asked):
        """Starts the worker and waits until it has loaded."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [asked.python, "-m", f"experiments.bench.{asked.module}", json.dumps(asked.arguments)]
        self.process = subprocess.Popen(command, env={**os.environ, **asked.env}, **pipes)
        self.steps: list[dict[str, float]] = []
        self._answer()

    def step(self) -> None:
        """Runs one step, after a pause in which the threads of the other sides come to rest."""
        time.sleep(PAUSE)
        print("step", file=self.process.stdin, flush=True)
        self.steps.append(self._answer())

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended: {self.process.args}")
        return json.loads(line)

    def median(self, key: str) -> float:
        """The median over the turns that count."""
        return statistics.median(s[key] for s in self.steps[WARMUP:])

    def range(self) -> list[float]:
        """The least and the most seconds of the turns that count."""
        seconds = [s["seconds"] for s in self.steps[WARMUP:]]
        return [min(seconds), max(seconds)]


@contextlib.contextmanager
def started(asked: Mapping[str, Asked]) -> Iterator[dict[str, Side]]:
    """The sides, started one after the other, so that a side may read the files of those before it."""
    sides: dict[str, Side] = {}
    try:
        for name, worker in asked.items():
            sides[name] = Side(worker)
        yield sides
    finally:
        for side in sides.values():
            side.process.kill()
            side.process.wait()


def take_turns(sides: Mapping[str, Side], rounds: int) -> None:
    """Lets every side step `rounds` times, and WARMUP times before, in an order that is reversed every round."""
    for turn in range(WARMUP + rounds):
        for side in list(sides.values())[:: 1 if turn % 2 else -1]:
            side.step()
        seen = (f"{name} {side.steps[-1]['seconds']:.2f}s" for name, side in sides.items())
        print(f"round {turn + 1}:", *seen, flush=True)


def loss_difference(ours: Side, theirs: Side) -> float:
    """The largest difference between the losses of the same step."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(ours.steps, theirs.steps, strict=True))
