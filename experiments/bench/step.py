"""One training step, side by side with peft: `python -m experiments.bench.step [--rounds=N]`, or `make bench`.

SmolLM2-135M with its real weights, float32 on both sides, rank 8 on q and v, 4 rows of 128 tokens of BBC News,
AdamW. Four processes (ours and peft's, LoRA and DoRA) load the same weights and the same initial adapters and
then take turns, one step a turn, in an order that is reversed every round. A fifth makes the products with frozen
weights alone (`products.py`), which is what a step cannot do without. Written to `results/step.json`:
medians of the wall time of a step, their ratio, the time to the first step (compilation included), and the peak
of resident memory since loading.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.bench.worker import machine
from lowrank.workdir import write_json

ROUNDS = flags.DEFINE_integer("rounds", 15, "Steps of each side that count; two more warm up.", lower_bound=3)
OUT = Path(__file__).parent / "results" / "step.json"
WARMUP, METHODS = 2, ("lora", "dora")
PAUSE = 0.5  # seconds between turns: torch's threads spin for a while after a step, and would slow the next one
# Huge pages spare the CPU's TLB, as the README advises on a CPU; they do not make torch faster.
OURS_ENV = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Side:
    """A worker process that steps when told to."""

    def __init__(self, module: str, method: str, folder: str, env: dict[str, str]):
        """Starts the worker and waits until it has loaded."""
        argument = json.dumps({"method_name": method, "folder": folder})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", f"experiments.bench.{module}", argument]
        self.process = subprocess.Popen(command, env={**os.environ, **env}, **pipes)
        self.steps: list[dict[str, float]] = []
        self._answer()

    def step(self) -> None:
        """One step, after a pause in which the other sides come to rest."""
        time.sleep(PAUSE)
        print("step", file=self.process.stdin, flush=True)
        self.steps.append(self._answer())

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended: {self.process.args}")
        return json.loads(line)

    def median(self, key: str) -> float:
        """The median over the rounds that count."""
        return statistics.median(s[key] for s in self.steps[WARMUP:])


def main(argv: list[str]) -> None:
    """Runs the rounds and writes the results."""
    del argv
    with tempfile.TemporaryDirectory() as folder, _sides(folder) as sides:
        for turn in range(WARMUP + ROUNDS.value):
            for side in list(sides.values())[:: 1 if turn % 2 else -1]:
                side.step()
            print(f"round {turn + 1}:", *(f"{'/'.join(k)} {s.steps[-1]['seconds']:.2f}s" for k, s in sides.items()))
        results = {m: _compare(sides["ours", m], sides["theirs", m]) for m in METHODS}
        results["products"] = {"torch_s": sides["products", ""].median("seconds")}
    results["dora"]["over_our_lora"] = results["dora"]["ours_s"] / results["lora"]["ours_s"]
    results["machine"] = machine("jax", "torch", "transformers", "peft")
    OUT.parent.mkdir(exist_ok=True)
    write_json(OUT, results)
    print(json.dumps(results, indent=1))


@contextlib.contextmanager
def _sides(folder: str) -> Iterator[dict[tuple[str, str], Side]]:
    sides: dict[tuple[str, str], Side] = {}
    try:
        for method in METHODS:  # ours first: it leaves the tokens and the initial adapter
            sides["ours", method] = Side("ours", method, folder, OURS_ENV)
            sides["theirs", method] = Side("theirs", method, folder, {})
        sides["products", ""] = Side("products", "", folder, {})
        yield sides
    finally:
        for side in sides.values():
            side.process.kill()
            side.process.wait()


def _compare(ours: Side, theirs: Side) -> dict[str, Any]:
    losses = zip(ours.steps, theirs.steps, strict=True)
    return {
        "ours_s": ours.median("seconds"),
        "peft_s": theirs.median("seconds"),
        "ratio": theirs.median("seconds") / ours.median("seconds"),
        "ours_cpu_s": ours.median("cpu_s"),
        "peft_cpu_s": theirs.median("cpu_s"),
        "ours_rss_mb": ours.steps[-1]["rss_mb"],
        "peft_rss_mb": theirs.steps[-1]["rss_mb"],
        "ours_first_step_s": ours.steps[0]["seconds"],
        "peft_first_step_s": theirs.steps[0]["seconds"],
        "ours_range_s": _range(ours),
        "peft_range_s": _range(theirs),
        "largest_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in losses),
        "rounds": ROUNDS.value,
    }


def _range(side: Side) -> list[float]:
    seconds = [s["seconds"] for s in side.steps[WARMUP:]]
    return [min(seconds), max(seconds)]


if __name__ == "__main__":
    app.run(main)
