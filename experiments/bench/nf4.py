"""NF4, side by side with bitsandbytes on the CPU: `python -m experiments.bench.nf4 [--rounds=N]`.

Kernels of SmolLM2-135M's first block, float32 on both sides, with and without double quantization: how long it takes to
quantize one, to decode it, and to multiply 512 rows by it, and how far the decoded kernel is from the kernel. The two
take turns in one process, in an order that is reversed every round. Written to `results/nf4.json`: medians in
milliseconds, their ratio, and relative errors `|decoded - W| / |W|`, which agree or the run fails.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import jax
import numpy as np
import torch
from absl import app, flags

from experiments.bench.worker import machine
from lowrank import dot, pretrained
from lowrank.core.files import write_json
from lowrank.weights.quantized.schemes import SCHEMES

ROUNDS = flags.DEFINE_integer("rounds", 15, "Calls of each side that count; two more warm up.", lower_bound=3)
OUT = Path(__file__).parent / "results" / "nf4.json"
MODEL, KERNELS, ROWS, WARMUP = "smollm2-135m", ("attn/q", "mlp/up", "mlp/down"), 512, 2
OPERATIONS = ("quantize", "dequantize", "matmul")
PAUSE = 0.3  # seconds between turns: torch's threads spin for a while after a call, and would slow the next one

Side = Mapping[str, Callable[[], np.ndarray]]  # each operation, done when it returns


def main(argv: list[str]) -> None:
    """Compares the kernels and writes the results."""
    del argv
    layers = pretrained.load(MODEL).params["layers"]
    results: dict[str, Any] = {}
    for name in KERNELS:
        group, leaf = name.split("/")
        kernel = np.asarray(layers[group][leaf]["kernel"][0])
        for double in (False, True):
            found = {"kernel": name, "shape": kernel.shape, "double": double, **compare(kernel, double, ROUNDS.value)}
            results[f"{name}{' double' if double else ''}"] = found
            print(json.dumps(found), flush=True)
    results["machine"] = machine("jax", "torch", "bitsandbytes")
    OUT.parent.mkdir(exist_ok=True)
    write_json(OUT, results)


def compare(kernel: np.ndarray, double: bool, rounds: int, rows: int = ROWS, pause: float = PAUSE) -> dict[str, Any]:
    """Errors and times of both sides for a kernel `[in, out]` float32. Raises ValueError if their values differ."""
    x = np.random.default_rng(0).standard_normal((rows, kernel.shape[0])).astype(np.float32)
    sides = {"ours": ours(kernel, x, double), "bitsandbytes": theirs(kernel, x, double)}
    errors = {name: _error(side["dequantize"](), kernel) for name, side in sides.items()}
    gap = _error(sides["ours"]["matmul"](), sides["bitsandbytes"]["matmul"]())
    if abs(errors["ours"] / errors["bitsandbytes"] - 1) > 1e-3 or gap > 1e-3:
        raise ValueError(f"the two do not agree: errors {errors}, products {gap} apart")
    found: dict[str, Any] = {"error": errors, "product_gap": gap, "rounds": rounds}
    for operation in OPERATIONS:
        taken = _turns({name: side[operation] for name, side in sides.items()}, rounds, pause)
        medians = {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}
        found[operation] = {**medians, "ratio": medians["bitsandbytes"] / medians["ours"]}
    return found


def ours(kernel: np.ndarray, x: np.ndarray, double: bool) -> Side:
    """This library's operations, compiled."""
    kernel, x = jax.device_put((kernel, x))
    quantize, decode = jax.jit(SCHEMES["nf4"](double=double)), jax.jit(lambda w: w.materialize())
    multiply, codes = jax.jit(dot), quantize(kernel)
    calls = (lambda: quantize(kernel).codes, lambda: decode(codes), lambda: multiply(x, codes))
    done = [lambda call=call: np.asarray(jax.block_until_ready(call())) for call in calls]
    return dict(zip(OPERATIONS, done, strict=True))


def theirs(kernel: np.ndarray, x: np.ndarray, double: bool) -> Side:
    """bitsandbytes' operations, on the kernel as torch has it, `[out, in]`."""
    w, rows = torch.from_numpy(np.ascontiguousarray(kernel.T)), torch.from_numpy(x)
    bnb = bitsandbytes.functional

    def quantize() -> Any:
        return bnb.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type="nf4")

    packed, state = quantize()
    calls = (
        lambda: quantize()[0],
        lambda: bnb.dequantize_4bit(packed, state).T,
        lambda: bitsandbytes.matmul_4bit(rows, packed.t(), state),
    )
    return dict(zip(OPERATIONS, [lambda call=call: call().numpy() for call in calls], strict=True))


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _turns(calls: Mapping[str, Callable[[], Any]], rounds: int, pause: float) -> dict[str, list[float]]:
    """Seconds of each call that counts."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            time.sleep(pause)
            start = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - start)
    return {name: seconds[WARMUP:] for name, seconds in taken.items()}


if __name__ == "__main__":
    app.run(main)
