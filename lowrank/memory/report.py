"""What `python -m launch.preflight` prints: a table for people, or the same as JSON."""

import dataclasses
from typing import Any

from lowrank.memory.advice import Step
from lowrank.memory.compiled import Compiled
from lowrank.memory.devices import GIB, Target
from lowrank.memory.formulas import Memory
from lowrank.memory.gpus import GPUS
from lowrank.training.run import Run

HOW = "; with `pip install 'jax[cuda12-local]'` it is compiled for it"
DEFAULT_SHARE = 0.75  # of a GPU's memory that jax takes, unless told otherwise


def size(count: float) -> str:
    """`513.1 MB`: powers of ten, as files and papers have them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count:.0f} B"


@dataclasses.dataclass(frozen=True)
class Report:
    """A run, what it is planned for, and the figures."""

    run: Run
    target: Target
    formula: Memory
    compiled: Compiled | None
    native: bool  # compiled for the target itself, not for another platform in its place
    advice: list[Step]

    @property
    def needed(self) -> int:
        """What decides: the compiler's figure if it is of the target, else the formula's."""
        return self.compiled.peak if self.compiled and self.native else self.formula.peak

    @property
    def fits(self) -> bool:
        """Whether what is needed is there."""
        return self.needed <= self.target.memory


def rows(r: Report) -> list[tuple[str, int, int | None]]:
    """`(what, bytes by formula, bytes as compiled or None)`."""
    f, c = r.formula, r.compiled
    found = [(name, getattr(f, name), getattr(c, name, None)) for name in ("weights", "adapter", "moments", "batch")]
    found += [(name, getattr(f, name), None) for name in ("gradients", "activations", "temporary")]
    found += [("working", f.working, c.step.temporary if c and not c.step.refused else None)]
    found += [("step", f.step, c and c.step.total)]
    if f.kv_cache:
        found += [("kv_cache", f.kv_cache, c and c.generation and c.generation.temporary)]
        found += [("generation", f.generation, c and c.generation and c.generation.total + c.moments)]
    if f.host:
        found += [("host", f.host, c and c.step.host)]
    return found


NAMES = {
    "weights": "weights (frozen)",
    "adapter": "adapter (trained)",
    "moments": "optimizer moments",
    "working": "  all three",
    "step": "training step",
    "kv_cache": "KV cache",
    "generation": "writing texts",
    "host": "on the host",
}
NOTES = {"kv_cache": "compiled: all of the program's temporary bytes"}


def text(r: Report) -> str:
    """The table, the verdict and the advice."""
    c, mesh = r.run.config, ", ".join(f"{axis}={size}" for axis, size in r.run.mesh.shape.items() if size > 1)
    where = f"{r.run.mesh.size} x {r.target.name}" + (f" ({mesh})" if mesh else "")
    lines = [f"{c.method['name']} on {r.run.model.name}, {where}: bytes on each device", ""]
    by = f"compiled for {r.compiled.platform}" if r.compiled else "not compiled"
    width = max(28, len(by) + 2)
    lines += [f"{'':20}{'formula':>12}{by:>{width}}{'formula / compiled':>22}"]
    lines += [_line(name, formula, compiled, width) for name, formula, compiled in rows(r)]
    lines += ["", *r.run.notes, *verdict(r)]
    lines += [f"  {line}" for line in _advice(r)]
    return "\n".join(lines)


def _line(name: str, formula: int, compiled: int | None, width: int) -> str:
    ratio = f"{formula / compiled:.2f}" if compiled else ""
    shown = size(compiled) if compiled is not None else ""
    return f"{NAMES.get(name, name):20}{size(formula):>12}{shown:>{width}}{ratio:>22}  {NOTES.get(name, '')}".rstrip()


def verdict(r: Report) -> list[str]:
    """Whether it fits, by which figure, and what to beware of."""
    source = f"as compiled for {r.compiled.platform}" if r.compiled and r.native else "by formula"
    have = f"the {r.target.memory / GIB:.4g} GiB of {r.target.name}"
    if r.fits:
        lines = [f"fits: {size(r.needed)} ({source}) of {have}"]
    else:
        lines = [f"does not fit: {size(r.needed)} ({source}) is {size(r.needed - r.target.memory)} more than {have}"]
    gpu = r.target.name.partition(":")[0] in GPUS
    if r.compiled and not r.native:
        lines.append(
            f"compiled for {r.compiled.platform}, as there is no {r.target.name} here: other kernels and other room "
            f"(a CPU widens bfloat16), so the formula decides{HOW if gpu else ''}"
        )
    if (gpu or "NVIDIA" in r.target.name) and r.fits and r.needed > DEFAULT_SHARE * r.target.memory:
        lines.append("jax takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set")
    return lines


def _advice(r: Report) -> list[str]:
    if r.fits:
        return []
    if not r.advice:
        return ["nothing that lowrank knows makes it smaller"]
    lines = ["what to change, cheapest first (by formula; 'then': with all the lines before):"]
    for step in r.advice:
        what = " ".join(f"--config.{k}={v}" for k, v in step.option.changes.items())
        lines.append(f"{what}: saves {size(step.saves)}, then {size(step.leaves_with_all_before)}; {step.option.costs}")
    left = r.advice[-1].leaves_with_all_before
    lines.append("together they fit" if left <= r.target.memory else f"all together leave {size(left)}: too much still")
    return lines


def plain(r: Report) -> dict[str, Any]:
    """The report for JSON: bytes on each device."""
    table = rows(r)
    compiled = r.compiled and {"platform": r.compiled.platform, "native": r.native, **dataclasses.asdict(r.compiled)}
    return {
        "model": r.run.model.name,
        "method": r.run.config.method["name"],
        "mesh": dict(r.run.mesh.shape),
        "target": r.target.name,
        "memory_bytes": r.target.memory,
        "formula": {name: formula for name, formula, _ in table},
        "compiled": compiled,
        "formula_over_compiled": {name: formula / by for name, formula, by in table if by},
        "needed_bytes": r.needed,
        "fits": r.fits,
        "missing_bytes": max(0, r.needed - r.target.memory),
        "notes": list(r.run.notes),
        "advice": [{**step._asdict(), "option": step.option._asdict()} for step in r.advice],
    }
