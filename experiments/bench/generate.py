"""Texts beside transformers and peft: `python -m experiments.bench.generate [--rounds=N]`.

SmolLM2-135M in float32 with a DoRA of rank 8 on q and v writes 64 tokens after each of 1, 8 and 32 prompts of 16 tokens
of BBC News, greedily and without an end. Beside it are peft with the same adapter attached, and transformers with the
adapter merged. Each side is a process that loads once; then they take turns. Written to `results/generate.json` under
the processor's name: tokens per second by the median wall time, the ratio to peft's, and how many texts are the same.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.bench.sides import OURS_ENV, WARMUP, Asked, Side, started, take_turns
from experiments.bench.worker import machine
from lowrank.core.files import write_json
from lowrank.core.processor import processor_name

BATCHES, LENGTH, NEW = (1, 8, 32), 16, 64  # rows, tokens of a prompt, new tokens
ROUNDS = flags.DEFINE_integer("rounds", 7, "Calls of each side that count; two more warm up.", lower_bound=1)
OUT = Path(__file__).parent / "results" / "generate.json"


def main(argv: list[str]) -> None:
    """Runs the rounds of each batch, and writes the results."""
    del argv
    results: dict[str, Any] = {}
    for rows in BATCHES:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"rows": rows, "folder": folder}
            asked = {"ours": Asked("generate_ours", OURS_ENV, arguments)}
            for name in ("peft", "merged"):
                asked[name] = Asked("generate_theirs", {}, {**arguments, "merged": name == "merged"})
            with started(asked) as sides:
                take_turns(sides, ROUNDS.value)
            texts = {name: np.load(Path(folder) / f"{name}.npy") for name in sides}
        results[str(rows)] = _compare(rows, sides, texts)
    results |= {"rounds": ROUNDS.value, "machine": machine("jax", "torch", "transformers", "peft")}
    print(json.dumps(results, indent=1))
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    write_json(OUT, {**kept, processor_name(): results})


def _compare(rows: int, sides: dict[str, Side], texts: dict[str, np.ndarray]) -> dict[str, Any]:
    rates = {name: rows * NEW / side.median("seconds") for name, side in sides.items()}
    pairs = zip(sides["ours"].steps[WARMUP:], sides["peft"].steps[WARMUP:], strict=True)
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
    return {
        **{f"{name}_tokens_s": rate for name, rate in rates.items()},
        "ratio": rates["ours"] / rates["peft"],
        "ratio_to_merged": rates["ours"] / rates["merged"],
        "ratio_range": [min(ratios), max(ratios)],
        "same_texts_as_peft": int(np.sum(np.all(texts["ours"] == texts["peft"], axis=1))),
        **{f"{name}_rss_mb": side.steps[-1]["rss_mb"] for name, side in sides.items()},
        "ours_first_call_s": sides["ours"].steps[0]["seconds"],
    }


if __name__ == "__main__":
    app.run(main)
