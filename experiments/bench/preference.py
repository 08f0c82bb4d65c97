"""A step on pairs beside a supervised step on the same tokens: `python -m experiments.bench.preference`.

SmolLM2-135M with LoRA on every kernel reads 8 answers of 96 tokens: as 8 rows of supervised tuning, as 4 pairs of DPO
with stored and with copied references, and as 8 labeled rows of KTO. The programs take turns in one process. Written to
`results/preference.json`.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app

from configs import dpo
from experiments.bench.ours import stepping
from experiments.bench.sides import WARMUP
from experiments.bench.worker import machine
from experiments.objectives import pairs
from lowrank.core import tree
from lowrank.core.files import write_json
from lowrank.training import build
from lowrank.training.reference import StoredReference

ROUNDS, PAIRS, LENGTH = 10, 4, 96
OUT = Path(__file__).parent / "results" / "preference.json"
SUPERVISED = "supervised"
SIDES: dict[str, dict[str, Any]] = {
    SUPERVISED: {"objective": "causal_lm", "source": "rows", "batch_size": 2 * PAIRS},
    "dpo, stored": {"objective": {"name": "preference"}, "source": "pairs", "batch_size": PAIRS},
    "dpo, copied": {
        "objective": {"name": "preference", "reference": "copied"},
        "source": "pairs",
        "batch_size": PAIRS,
    },
    "kto": {"objective": "kto", "source": "rows", "batch_size": 2 * PAIRS},
}


def step_of(folder: Path, objective: Any, source: str, batch_size: int) -> Callable[[], float]:
    """A step of an objective on the first records of a source."""
    config = dpo.get_config()
    config.steps, config.optim.warmup = 1, 0  # which a stored reference is computed for
    config.data.update(source=f"jsonl:{folder / source}", batch_size=batch_size, seq_len=LENGTH, shuffle=False)
    config.data.update(packing=False, prompt_loss_weight=0.0)
    config.eval = {}
    with config.ignore_type():
        config.objective = objective
    run = build.build_run(config)
    optimizer = run.optimizer()
    state, frozen, _ = run.start(run.load().params, optimizer)
    reference = StoredReference(run)
    reference.fill(tree.join(state.trained, frozen))
    batch = run.put(reference.join(next(run.loader)))
    return stepping(run.step(optimizer), state, frozen, batch, run.learning_rates[0])


def main(argv: list[str]) -> None:
    """Measures and writes `{side: seconds, "RATIO": ..., "machine": ...}`."""
    del argv
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), [*pairs.pairs("train")][: 2 * PAIRS]
        pairs.write(folder / "pairs", {"train": found})
        answers = ("chosen", "rejected")
        rows = [
            {"prompt": p["prompt"], "completion": p[key], "label": key == answers[0]} for p in found for key in answers
        ]
        pairs.write(folder / "rows", {"train": rows})
        steps = {side: step_of(folder, **options) for side, options in SIDES.items()}
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(WARMUP + ROUNDS):
            for side in list(SIDES)[:: 1 if turn % 2 else -1]:
                with timed(seconds[side]):
                    steps[side]()
            print(f"round {turn + 1}:", *(f"{side} {times[-1]:.2f}s" for side, times in seconds.items()), flush=True)
    medians = {side: statistics.median(times[WARMUP:]) for side, times in seconds.items()}
    ratios = {side: median / medians[SUPERVISED] for side, median in medians.items()}
    write_json(OUT, {"seconds": medians, "ratio": ratios, "machine": machine("jax")})


@contextlib.contextmanager
def timed(times: list[float]):
    """Appends the seconds that the block takes."""
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


if __name__ == "__main__":
    app.run(main)
