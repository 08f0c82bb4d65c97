"""A step whose loss is on answers alone, the head over all positions at once and over chunks that skip prompts.

`python -m experiments.bench.answers`: SmolLM2-135M with LoRA on BBC headlines, as the task `headlines` of the studies.
Both programs are compiled first and then take turns, in an order that is reversed every round.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from absl import app

from experiments.bench.worker import machine
from experiments.methods.rows import ROWS
from experiments.study.tasks import HEADLINES
from lowrank import plan, sharding, step
from lowrank.workdir import write_json

CHUNKS, ROUNDS, WARMUP = (0, 128), 12, 2
OUT = Path(__file__).parent / "results" / "answers.json"


def stepper(rows: int) -> tuple[Callable[[], float], float]:
    """A function that makes one step and returns its seconds, for chunks of `rows`; the share of tokens with weight."""
    config = HEADLINES.config(ROWS["lora"], 1e-3, seed=0)
    config.loss_rows = rows
    job = plan.make(config)
    optimizer = job.optimizer()
    state, frozen, _ = job.start(job.load().params, optimizer)
    batch = sharding.global_batch(next(job.loader), job.mesh)
    program = step.compile(job.step(optimizer), state, frozen, batch)

    def one_step() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = program(state, frozen, batch, job.rates[-1])
        float(metrics["loss"])
        return time.perf_counter() - began

    return one_step, float((batch["weights"] > 0).mean())


def main(argv: list[str]) -> None:
    """Takes the times and writes them, as `{"0": seconds, "128": seconds, "answers": share}`."""
    del argv
    sides, share = {}, 0.0
    for rows in CHUNKS:
        sides[rows], share = stepper(rows)
    times = {rows: [] for rows in CHUNKS}
    for turn in range(WARMUP + ROUNDS):
        for rows in CHUNKS[:: 1 if turn % 2 else -1]:
            times[rows].append(sides[rows]())
        print(f"round {turn + 1}:", *(f"loss_rows={rows} {seen[-1]:.2f}s" for rows, seen in times.items()), flush=True)
    medians = {str(rows): statistics.median(seen[WARMUP:]) for rows, seen in times.items()}
    write_json(OUT, medians | {"answers": share, "machine": machine("jax")})


if __name__ == "__main__":
    app.run(main)
