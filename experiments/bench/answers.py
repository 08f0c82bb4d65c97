"""A step whose loss is on answers alone: our head over all positions, over chunks that skip prompts, and peft's step.

`python -m experiments.bench.answers`, in the environment of `make parity`: SmolLM2-135M with LoRA on BBC headlines, as
the task `headlines` of the studies; the sides take turns as those of `step.py` do. Written to `results/answers.json`.
"""

import tempfile
from pathlib import Path

import numpy as np
from absl import app

from experiments.bench.sides import OURS_ENV, Asked, loss_difference, started, take_turns
from experiments.bench.worker import machine
from lowrank.core.files import write_json

CHUNKS, ROUNDS = (0, 128), 12
OUT = Path(__file__).parent / "results" / "answers.json"


def main(argv: list[str]) -> None:
    """Measures and writes `{"0": seconds, "128": seconds, "peft": seconds, "answers": share, ...}`."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        asked = {str(rows): Asked("headlines", OURS_ENV, {"rows": rows, "folder": folder}) for rows in CHUNKS}
        asked["peft"] = Asked("theirs", {}, {"adapter": "lora", "folder": folder})
        with started(asked) as sides:
            take_turns(sides, ROUNDS)
        results = {name: side.median("seconds") for name, side in sides.items()}
        results["answers"] = float((np.load(Path(folder) / "batch.npz")["labels"] >= 0).mean())
    results["largest_loss_difference"] = max(loss_difference(sides[str(rows)], sides["peft"]) for rows in CHUNKS)
    write_json(OUT, results | {"machine": machine("jax", "torch", "transformers", "peft")})


if __name__ == "__main__":
    app.run(main)
