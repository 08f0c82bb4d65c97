"""The golden run: ten steps of every method on tiny models, with the losses and the saved tensors of each.

    python -m tests.support.golden --output before.json --workers 2
    python -m tests.support.golden --against before.json --only "llama/(lora|dora).*"

A change that keeps the behavior of the library leaves every number of the file the same, bit for bit, on one machine
and with one version of JAX. The run uses one device, and it sets no option of the compiler that saves time.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors import safe_open

from lowrank.training.loop import run as train
from tests.support import tiny_checkpoint as tiny
from tests.support.golden_cases import CASES

STEPS = 10
SERIES = {"losses": "train/loss", "grad_norms": "train/grad_norm"}  # by the key of a line in metrics.jsonl

Record = dict[str, Any]  # losses, grad_norms, and tensors: file of the adapter -> name -> SHA-256


def record(name: str, files: Path) -> Record:
    """Trains the case `name` on the folder of `write_files`; returns its losses, norms and hashes of tensors."""
    with tempfile.TemporaryDirectory() as folder, _silence():
        train(_config(name, files), folder)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        series = {key: [line[label] for line in lines if label in line] for key, label in SERIES.items()}
        return {**series, "tensors": _hashes(Path(folder) / "adapter")}


def write_files(folder: Path) -> Path:
    """Writes the tiny models `llama` and `bert` and `records.jsonl`; returns `folder`."""
    tiny.llama(folder / "llama")
    tiny.bert(folder / "bert")
    tiny.records(folder / "records.jsonl")
    return folder


def differences(before: Record, after: Record) -> str:
    """One line on how two records of a case differ; empty if they are equal bit for bit."""
    found = [_series(key, before[key], after[key]) for key in SERIES if before[key] != after[key]]
    files = sorted(before["tensors"].keys() | after["tensors"].keys())
    for file in files:
        a, b = (side["tensors"].get(file, {}) for side in (before, after))
        names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        if names:
            found.append(f"{file}: {len(names)} of {len(a.keys() | b.keys())} tensors: {', '.join(names[:4])}")
    return "; ".join(found)


def _series(key: str, before: list[float], after: list[float]) -> str:
    if len(before) != len(after):
        return f"{key}: {len(before)} steps became {len(after)}"
    pairs = list(zip(before, after, strict=True))
    first = next(i for i, (a, b) in enumerate(pairs) if a != b)
    most = max(abs(a - b) / (abs(a) or 1.0) for a, b in pairs)
    return f"{key}: from step {first + 1}, relative difference at most {most:.2e}"


def _config(name: str, files: Path) -> dict[str, Any]:
    model, case = name.split("/")[0], CASES[name]
    config: dict[str, Any] = {
        "seed": 0,
        "steps": STEPS,
        "objective": {"llama": "causal_lm", "bert": "classification"}[model],
        "model": {"name": str(files / model), **({"pooling": "mean"} if model == "bert" else {})},
        "method": case["method"],
        "data": {"source": f"jsonl:{files / 'records.jsonl'}", "split": "train", "seq_len": 32, "batch_size": 8},
        "optim": {"lr": 1e-2, "schedule": "linear", "warmup": 2},
        "mesh": {"data": 1},
        "log_every": 1,
    }
    for key, value in case.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
    return config


def _hashes(folder: Path) -> dict[str, dict[str, str]]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            found[str(path.relative_to(folder))] = {name: _hash(file.get_tensor(name)) for name in sorted(file.keys())}
    return found


def _hash(array: Any) -> str:
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing), contextlib.redirect_stdout(nothing):
        yield


def _start(flags: str) -> None:
    """Fixes what the numbers depend on in a process that has not used a device yet."""
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", False)


def _timed(name: str, files: Path) -> tuple[Record | str, float]:
    started = time.monotonic()
    try:
        result: Record | str = record(name, files)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    jax.clear_caches()
    return result, time.monotonic() - started


def record_all(names: list[str], workers: int, flags: str = "", output: Path | None = None) -> dict[str, Record | str]:
    """The record of each case, or the message of its error; prints progress.

    `flags` are added to XLA_FLAGS. The file `output` holds the records of the cases done after each of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        files, found = write_files(Path(folder)), {}
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start, (flags,)) as pool:
            futures = {pool.submit(_timed, name, files): name for name in names}
            for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                name, (found[name], seconds) = futures[future], future.result()
                failed = f"  {found[name]}" if isinstance(found[name], str) else ""
                if output:
                    output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
                print(f"[{count}/{len(names)}] {name} {seconds:.1f} s{failed}", file=sys.stderr, flush=True)
    return {name: found[name] for name in names}


def main() -> int:
    """Records or compares, as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the file to write the records to")
    parser.add_argument("--against", type=Path, help="the file to compare with, bit for bit")
    parser.add_argument("--only", default="", help="a regex that is searched for in the names of the cases")
    parser.add_argument("--workers", type=int, default=1, help="the number of processes")
    parser.add_argument("--flags", default="", help="options for XLA_FLAGS, whose value in the environment is ignored")
    parser.add_argument("--losses", type=Path, help="a file whose losses of the cases are replaced, to 9 digits")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    args = parser.parse_args()
    names = [name for name in CASES if re.search(args.only, name)]
    if args.list or not names:
        print("\n".join(names or CASES))
        return 0 if names else f"no case matches {args.only!r}"
    started = time.monotonic()
    found = record_all(names, args.workers, args.flags, args.output)
    print(f"{len(names)} cases in {time.monotonic() - started:.0f} s", file=sys.stderr)
    if args.losses:
        _write_losses(args.losses, found)
    failed = [name for name in names if isinstance(found[name], str)]
    return _compare(json.loads(args.against.read_text()), found) if args.against else len(failed) > 0


def _write_losses(path: Path, found: Mapping[str, Record | str]) -> None:
    losses = json.loads(path.read_text()) if path.exists() else {}
    losses |= {
        name: [float(f"{loss:.9g}") for loss in case["losses"]]
        for name, case in found.items()
        if isinstance(case, dict)
    }
    lines = [f"{json.dumps(name)}: {json.dumps(losses[name])}" for name in CASES if name in losses]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _compare(before: Mapping[str, Record | str], found: Mapping[str, Record | str]) -> int:
    status = 0
    for name, after in found.items():
        if isinstance(after, str) or not isinstance(before.get(name), dict):
            message = after if isinstance(after, str) else "it is not in the file to compare with"
        else:
            message = differences(before[name], after)
        if message:
            print(f"{name}: {message}")
            status = 1
    print("some cases differ" if status else f"all {len(found)} cases are equal")
    return status


if __name__ == "__main__":
    sys.exit(main())
