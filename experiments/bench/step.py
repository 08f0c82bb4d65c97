"""One training step beside peft's: `python -m experiments.bench.step [--rounds=N] [--check]`, or `make bench`.

SmolLM2-135M with its real weights, rank 8 on q and v, 4 rows of 128 tokens of BBC News, AdamW: LoRA in each policy of
precision, and DoRA in float32. Each side is a process that loads the same weights and initial adapters; then they take
turns, one step a turn, in an order that is reversed every round. Two more make the products with frozen weights alone
(`products.py`), which is what a step cannot do without. With `--tunix=PYTHON`, the interpreter of an environment that
has google-tunix, one more makes its step of LoRA in float32 on the same shapes. Written to `results/step.json` under
the processor's name: medians of the wall time of a step, their ratio, the time to the first step, without and with the
program that an earlier process compiled, and the peak of resident memory since loading.

`--check` (`make bench-check`) writes nothing: it prints the ratios that fell by more than a tenth of those in the file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.bench.sides import LENGTH, OURS_ENV, ROWS, WARMUP, Asked, Side, loss_difference, started, take_turns
from experiments.bench.step_cases import CASES, DTYPES, Case, slowed
from experiments.bench.worker import machine
from lowrank.core.files import write_json
from lowrank.core.processor import processor_name

ROUNDS = flags.DEFINE_integer("rounds", 11, "Steps of each side that count; two more warm up.", lower_bound=1)
TUNIX = flags.DEFINE_string("tunix", "", "The Python interpreter of an environment with google-tunix.")
CHECK = flags.DEFINE_bool("check", False, "Compare with the results of this processor, and write nothing.")
OUT = Path(__file__).parent / "results" / "step.json"


def main(argv: list[str]) -> None:
    """Runs the rounds, and writes or checks the results."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        asked = _asked(folder)
        with started(asked) as sides:
            take_turns(sides, ROUNDS.value)
        again = {case.name: _first_step(asked[case.name]) for case in CASES}
    results: dict[str, Any] = {case.name: _compare(case, sides, again[case.name]) for case in CASES}
    results["tunix"] = _tunix(sides)
    results["rounds"] = ROUNDS.value
    results["machine"] = machine("jax", "torch", "transformers", "peft")
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    print(json.dumps(results, indent=1))
    if CHECK.value:
        slower = slowed(kept.get(processor_name()), results)
        print("\n".join(slower or ["no ratio fell by more than a tenth"]))
        sys.exit(1 if slower else 0)
    write_json(OUT, {**kept, processor_name(): results})


def _asked(folder: str) -> dict[str, Asked]:
    """The sides by name: ours first, as they leave the batch and the initial adapters."""
    asked: dict[str, Asked] = {}
    for case in CASES:
        arguments = {"method_name": case.method, "precision": case.precision, "folder": folder}
        asked[case.name] = Asked("ours", OURS_ENV, arguments)
    for case in reversed(CASES):
        adapter = f"{case.method}-{case.precision}"
        arguments = {"adapter": adapter, "folder": folder, "dtype": case.dtype}
        asked[case.peft] = Asked("theirs", {}, arguments)
    asked |= {f"products {dtype}": Asked("products", {}, {"dtype": dtype}) for dtype in DTYPES}
    if TUNIX.value:
        sizes = {"rows": ROWS, "length": LENGTH}
        asked["tunix"] = Asked("tunix_step", {"JAX_PLATFORMS": "cpu"}, sizes, TUNIX.value)
    return asked


def _tunix(sides: dict[str, Side]) -> dict[str, Any]:
    """Tunix's step in float32 beside ours, or the reason why there is none."""
    if "tunix" not in sides:
        return {"refused": "no environment with google-tunix"}
    side, ours = sides["tunix"], sides["lora float32"]
    version = "import importlib.metadata as m; print(m.version('google-tunix'))"
    return {
        "step_s": side.median("seconds"),
        "ratio": side.median("seconds") / ours.median("seconds"),
        "range_s": side.range(),
        "rss_mb": side.steps[-1]["rss_mb"],
        "first_step_s": side.steps[0]["seconds"],
        "version": subprocess.check_output([TUNIX.value, "-c", version], text=True).strip(),
    }


def _first_step(asked: Asked) -> float:
    """The seconds to the first step of a process that finds its program compiled."""
    with started({"again": asked}) as sides:
        sides["again"].step()
        return sides["again"].steps[0]["seconds"]


def _compare(case: Case, sides: dict[str, Side], again: float) -> dict[str, Any]:
    ours, theirs, products = sides[case.name], sides[case.peft], sides[f"products {case.dtype}"]
    pairs = list(zip(ours.steps, theirs.steps, strict=True))[WARMUP:]
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    return {
        "ours_s": ours.median("seconds"),
        "peft_s": theirs.median("seconds"),
        "products_s": products.median("seconds"),
        "ratio": theirs.median("seconds") / ours.median("seconds"),
        "ratio_range": [min(ratios), max(ratios)],
        "share_of_limit": products.median("seconds") / ours.median("seconds"),
        "ours_cpu_s": ours.median("cpu_s"),
        "peft_cpu_s": theirs.median("cpu_s"),
        "ours_rss_mb": ours.steps[-1]["rss_mb"],
        "peft_rss_mb": theirs.steps[-1]["rss_mb"],
        "ours_first_step_s": ours.steps[0]["seconds"],
        "ours_first_step_cached_s": again,
        "peft_first_step_s": theirs.steps[0]["seconds"],
        "ours_range_s": ours.range(),
        "peft_range_s": theirs.range(),
        "largest_loss_difference": loss_difference(ours, theirs),
    }


if __name__ == "__main__":
    app.run(main)
