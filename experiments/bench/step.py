"""One training step, side by side with peft: `python -m experiments.bench.step [--rounds=N]`, or `make bench`.

SmolLM2-135M with its real weights, float32 on both sides, rank 8 on q and v, 4 rows of 128 tokens of BBC News,
AdamW. Four processes (ours and peft's, LoRA and DoRA) load the same weights and the same initial adapters and
then take turns, one step a turn, in an order that is reversed every round. A fifth makes the products with frozen
weights alone (`products.py`), which is what a step cannot do without. Written to `results/step.json`:
medians of the wall time of a step, their ratio, the time to the first step (compilation included), and the peak
of resident memory since loading.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.bench.sides import OURS_ENV, Asked, Side, loss_difference, started, take_turns
from experiments.bench.worker import machine
from lowrank.core.files import write_json

ROUNDS = flags.DEFINE_integer("rounds", 15, "Steps of each side that count; two more warm up.", lower_bound=3)
OUT = Path(__file__).parent / "results" / "step.json"
METHODS = ("lora", "dora")


def main(argv: list[str]) -> None:
    """Runs the rounds and writes the results."""
    del argv
    with tempfile.TemporaryDirectory() as folder, started(_asked(folder)) as sides:
        take_turns(sides, ROUNDS.value)
        results = {m: _compare(sides[f"ours/{m}"], sides[f"theirs/{m}"]) for m in METHODS}
        results["products"] = {"torch_s": sides["products"].median("seconds")}
    results["dora"]["over_our_lora"] = results["dora"]["ours_s"] / results["lora"]["ours_s"]
    results["machine"] = machine("jax", "torch", "transformers", "peft")
    write_json(OUT, results)
    print(json.dumps(results, indent=1))


def _asked(folder: str) -> dict[str, Asked]:
    asked: dict[str, Asked] = {}
    for method in METHODS:  # ours first: it leaves the batch and the initial adapter
        arguments = {"method_name": method, "folder": folder}
        asked |= {f"ours/{method}": ("ours", OURS_ENV, arguments), f"theirs/{method}": ("theirs", {}, arguments)}
    return asked | {"products": ("products", {}, {})}


def _compare(ours: Side, theirs: Side) -> dict[str, Any]:
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
        "ours_range_s": ours.range(),
        "peft_range_s": theirs.range(),
        "largest_loss_difference": loss_difference(ours, theirs),
        "rounds": ROUNDS.value,
    }


if __name__ == "__main__":
    app.run(main)
