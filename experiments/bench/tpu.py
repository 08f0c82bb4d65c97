"""What a TPU's compiler makes of training steps, without a TPU: `python -m experiments.bench.tpu [--only=REGEX]`.

Each case of `tpu_cases` is planned by formula. Its step is also compiled where the case requires it, or where the
formula is within a quarter of the chips' memory. Written to `results/tpu.json` after each case: bytes on each device,
collectives times the trips of their loops, and whether it fits. A case whose command is in the file is left alone;
`--again` plans it anew, and `--formula` compiles nothing; together they renew the formula and leave what was compiled.
No time is measured or estimated.
"""

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from experiments.bench.tpu_cases import Case, cases
from launch import preflight
from lowrank.core.errors import UserError
from lowrank.core.files import write_json
from lowrank.memory import devices, tpus
from lowrank.memory.report import Report

ONLY = flags.DEFINE_string("only", "", "A regex that is found in the keys of the cases to plan.")
AGAIN = flags.DEFINE_bool("again", False, "Plan cases anew whose results exist.")
FORMULA = flags.DEFINE_bool("formula", False, "Compile nothing.")
OUT = Path(__file__).parent / "results" / "tpu.json"
COMPILED = ("compiled", "collectives", "versions", "needed", "fits")  # what a result has of the compiler
NEAR = 0.25  # how far the formula may be from the memory for a step to be compiled, as a share of the memory


def main(argv: list[str]) -> None:
    """Plans the cases and writes the results."""
    del argv
    for case in cases():
        if re.search(ONLY.value, case.key):
            plan(case)


def plan(case: Case) -> None:
    """Adds the case to the results, unless it is there."""
    before = read().get(case.key, {})
    known = before = before if before.get("words") == case.words else {}
    if known and not AGAIN.value and (FORMULA.value or "compiled" in known or not asks_for_compilation(case, known)):
        return
    try:
        known = measure(case, compiles=False)
        if FORMULA.value:
            known |= {name: before[name] for name in COMPILED if "compiled" in before}
        elif asks_for_compilation(case, known):
            known = measure(case, compiles=True)
    except UserError as e:
        known = {"words": case.words, "refused": str(e)}
    add(case.key, known)
    print(case.key, known.get("refused") or {name: known[name] for name in ("needed", "memory", "fits")}, flush=True)
    jax.clear_caches()


def read() -> dict[str, Any]:
    """The results by key; empty before the first."""
    return json.loads(OUT.read_text()) if OUT.exists() else {}


def add(key: str, result: dict[str, Any]) -> None:
    """Writes the result into the file."""
    write_json(OUT, dict(sorted({**read(), key: result}.items())))


def restart_for_tpus(module: str) -> None:
    """Starts this process again in the environment of one that compiles for TPUs, unless it has that."""
    environment = tpus.environment("v5e:4x4")  # any: every topology can be named in it
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | environment)


def asks_for_compilation(case: Case, known: dict[str, Any]) -> bool:
    """Whether the case requires it, or the formula alone cannot tell whether it fits."""
    return "refused" not in known and (case.required or abs(known["formula"]["peak"] / known["memory"] - 1) <= NEAR)


def measure(case: Case, compiles: bool) -> dict[str, Any]:
    """The figures of a case, in bytes on each device."""
    options, changes = preflight.parse(case.words)
    target = devices.parse_topology(case.topology)
    return figures(case, preflight.make_report(preflight.load_config(options.config, changes), target, compiles))


def figures(case: Case, r: Report) -> dict[str, Any]:
    """A report as JSON values."""
    formula = {name: getattr(r.formula, name) for name in ("weights", "adapter", "moments", "activations", "peak")}
    found = {"words": case.words, "memory": r.target.memory, "needed": r.needed, "fits": r.fits, "formula": formula}
    if r.compiled:
        step = r.compiled.step
        moved = {kind: [of.count, of.bytes] for kind, of in step.collectives.items() if of.count}
        sizes = {"arguments": step.arguments, "temporary": step.temporary, "code": step.code, "total": step.total}
        found |= {"compiled": {"refused": step.refused} if step.refused else sizes, "collectives": moved}
        found |= {"versions": {name: metadata.version(name) for name in ("jax", "libtpu")}}
    return found


if __name__ == "__main__":
    restart_for_tpus("experiments.bench.tpu")
    app.run(main)
