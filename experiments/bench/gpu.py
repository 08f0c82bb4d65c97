"""An NVIDIA GPU, side by side with torch: `python -m experiments.bench.gpu`, or `make gpu-bench`, within six minutes.

First every kernel is compared with float64; the rest runs only if all agree. Then kernels are timed in all forms in JAX
and in torch, eager and compiled, and a training step on the shapes of Llama with random weights against peft and
`torch.compile`. Each part is a process of its own, since JAX and torch do not share a GPU's memory. Every line that
a part prints is a result and is written to `results/gpu-<device>.json` at once, so that what is done is kept if the
time runs out. `--toy` takes small sizes and runs anywhere: it shows that the parts work, and writes to a temporary
file.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.bench.gpu_sizes import VARIANTS
from lowrank.core.files import write_json

TOY = flags.DEFINE_bool("toy", False, "Small sizes, on any machine; nothing is added to the results.")
SECONDS = flags.DEFINE_integer("seconds", 350, "No part runs longer than this after the start of the first.")
RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
STEPS = [(base, method) for base in ("llama-3.1-8b", "llama-3.2-1b") for method in VARIANTS]


def main(argv: list[str]) -> None:
    """Runs the parts and writes the results; exits with 1 if a kernel disagrees with float64."""
    del argv
    end, results = time.monotonic() + SECONDS.value, dict[str, Any]()
    for name, arguments in parts(TOY.value):
        for line in _lines(name, arguments, end - time.monotonic()):
            merge(results, line)
            _write(results)
        if not all(of["agrees"] for of in results.get("correctness", {"none": {"agrees": False}}).values()):
            sys.exit("a kernel was not found to agree with float64: nothing is timed")
    print(json.dumps(results, indent=1))


def parts(toy: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(module of this package, arguments of its main)`, the most important first."""
    yield "gpu_kernels", {"check": True, "toy": toy}
    yield "gpu_kernels", {"check": False, "toy": toy}
    for base, method in STEPS:
        yield "gpu_ours", {"base": base, "method": method, "toy": toy}
        yield "gpu_theirs", {"base": base, "method": method, "toy": toy}
    yield "gpu_torch", {"toy": toy}


def _lines(module: str, arguments: Mapping[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """The JSON lines of a part; where it fails or runs out of time, a line that says so."""
    environment = ENVIRONMENT | ({"JAX_PLATFORMS": "cpu"} if TOY.value else {})
    words = ["timeout", str(max(1, int(seconds))), sys.executable, "-m", f"experiments.bench.{module}"]
    with subprocess.Popen(
        [*words, json.dumps(arguments)], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                print(line.rstrip(), flush=True)
                yield json.loads(line)
    if process.returncode:
        why = "out of time" if process.returncode == 124 else f"exit code {process.returncode}"
        yield {"failed": {f"{module} {json.dumps(arguments)}": why}}


def merge(into: dict[str, Any], line: Mapping[str, Any]) -> None:
    """Adds the values of a line to nested results."""
    for key, value in line.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def _write(results: Mapping[str, Any]) -> None:
    device = str(results.get("device", "unknown")).lower().replace(" ", "-")
    write_json((Path(tempfile.gettempdir()) if TOY.value else RESULTS) / f"gpu-{device}.json", results)


if __name__ == "__main__":
    app.run(main)
