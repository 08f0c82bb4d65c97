"""The report of `python -m launch.preflight`: a table for people, or the same figures as JSON."""

import dataclasses
from typing import Any

from lowrank.memory.advice import Advice
from lowrank.memory.compiled import Compiled
from lowrank.memory.devices import GIB, Target
from lowrank.memory.flops import Flops
from lowrank.memory.formulas import Memory
from lowrank.memory.gpus import GPUS
from lowrank.memory.roofline import Roofline
from lowrank.training.run import Run

INSTALL = "; with `pip install 'jax[cuda12-local]'` it is compiled for it"
DEFAULT_SHARE = 0.75  # the share of a GPU's memory that jax takes by default


def format_bytes(num_bytes: float) -> str:
    """`513.1 MB`, in powers of ten, as files and papers print sizes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.4g} {unit}"
    return f"{num_bytes:.0f} B"


@dataclasses.dataclass(frozen=True)
class Report:
    """The memory of a run by formula and as compiled, beside the memory of its target."""

    run: Run
    target: Target
    formula: Memory
    compiled: Compiled | None
    native: bool  # whether it is compiled for the target itself and not for another platform in its place
    advice: list[Advice]
    flops: Flops
    roofline: Roofline | None

    @property
    def needed(self) -> int:
        """The peak that decides: the compiler's if it compiled for the target, else the formula's."""
        return self.compiled.peak if self.compiled and self.native else self.formula.peak

    @property
    def fits(self) -> bool:
        """Whether the target has the memory that is needed."""
        return self.needed <= self.target.memory


def table_rows(r: Report) -> list[tuple[str, int, int | None]]:
    """`[(name, bytes by formula, bytes as compiled or None)]` of the parts and their sums."""
    f, c = r.formula, r.compiled
    rows = [(name, getattr(f, name), getattr(c, name, None)) for name in ("weights", "adapter", "moments", "batch")]
    rows += [(name, getattr(f, name), None) for name in ("gradients", "activations", "temporary")]
    rows += [("working", f.working, c.step.temporary if c and not c.step.refused else None)]
    rows += [("step", f.step, c and c.step.total)]
    if f.kv_cache:
        rows += [("kv_cache", f.kv_cache, None)]
        rows += [("generation", f.generation, c and c.generation and c.generation.total + c.moments)]
    if f.host:
        rows += [("host", f.host, c and c.step.host)]
    return rows


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


def to_text(r: Report) -> str:
    """The report for people: the table, the verdict and the advice."""
    c, mesh = r.run.config, ", ".join(f"{axis}={size}" for axis, size in r.run.mesh.shape.items() if size > 1)
    where = f"{r.run.mesh.size} x {r.target.name}" + (f" ({mesh})" if mesh else "")
    lines = [f"{c.method['name']} on {r.run.model.name}, {where}: bytes on each device", ""]
    heading = f"compiled for {r.compiled.platform}" if r.compiled else "not compiled"
    width = max(28, len(heading) + 2)
    lines += [f"{'':20}{'formula':>12}{heading:>{width}}{'formula / compiled':>22}"]
    lines += [_line(name, formula, compiled, width) for name, formula, compiled in table_rows(r)]
    lines += ["", *_work(r), r.run.attention, *r.run.notes, *verdict(r)]
    lines += [f"  {line}" for line in _advice(r)]
    return "\n".join(lines)


def _line(name: str, formula: int, compiled: int | None, width: int) -> str:
    ratio = f"{formula / compiled:.2f}" if compiled else ""
    cells = f"{format_bytes(formula):>12}{format_bytes(compiled) if compiled is not None else '':>{width}}{ratio:>22}"
    return f"{NAMES.get(name, name):20}{cells}".rstrip()


def _work(r: Report) -> list[str]:
    """The lines on the operations, the collectives and the bound on a step's time."""
    again = f", {r.flops.recomputed / 1e12:.4g} TFLOP of them computed again" if r.flops.recomputed else ""
    lines = [f"a step: {r.flops.executed / 1e12:.4g} TFLOP on all devices{again}"]
    used = {kind: of for kind, of in (r.compiled.step.collectives if r.compiled else {}).items() if of.count}
    lines += [f"  {kind}: {of.count} a step, {format_bytes(of.bytes)} on each device" for kind, of in used.items()]
    if r.roofline and (tpu := r.target.tpu):
        bound = r.roofline
        parts = f"compute {bound.compute:.3g}, memory {bound.memory:.3g}, links {bound.links:.3g}"
        chip = f"{tpu.peak} TFLOP/s in bfloat16, {tpu.bandwidth} GB/s of memory, {tpu.links} GB/s of links a chip"
        lines += [f"  at least {bound.step:.3g} s ({parts}), at most {bound.mfu:.1%} MFU: a bound, by {chip}"]
    return lines


def verdict(r: Report) -> list[str]:
    """The lines that say whether the run fits, by which figure, and with which caveats."""
    source = f"as compiled for {r.compiled.platform}" if r.compiled and r.native else "by formula"
    memory, needed = f"the {r.target.memory / GIB:.4g} GiB of {r.target.name}", f"{format_bytes(r.needed)} ({source})"
    if r.fits:
        lines = [f"fits: {needed} of {memory}"]
    else:
        lines = [f"does not fit: {needed} is {format_bytes(r.needed - r.target.memory)} more than {memory}"]
    gpu = r.target.name.partition(":")[0] in GPUS
    if r.compiled and not r.native:
        lines.append(
            f"compiled for {r.compiled.platform}, as this machine lacks a {r.target.name}: kernels and memory differ "
            f"(a CPU widens bfloat16), so the formula decides{INSTALL if gpu else ''}"
        )
    if (gpu or "NVIDIA" in r.target.name) and r.fits and r.needed > DEFAULT_SHARE * r.target.memory:
        lines.append("jax takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set")
    return lines


def _advice(r: Report) -> list[str]:
    if r.fits:
        return []
    if not r.advice:
        return ["lowrank knows of no setting that makes it smaller"]
    lines = ["what to change, cheapest first (by formula; 'then': with all the lines before):"]
    for advice in r.advice:
        flags = " ".join(f"--config.{k}={v}" for k, v in advice.option.changes.items())
        peak = format_bytes(advice.leaves_with_all_before)
        lines.append(f"{flags}: saves {format_bytes(advice.saves)}, then {peak}; {advice.option.costs}")
    last = r.advice[-1].leaves_with_all_before
    enough = last <= r.target.memory
    lines.append("together they fit" if enough else f"all together leave {format_bytes(last)}: still too much")
    return lines


def to_json(r: Report) -> dict[str, Any]:
    """The report as JSON values: bytes on each device."""
    table = table_rows(r)
    programs = r.compiled and {"platform": r.compiled.platform, "native": r.native, **dataclasses.asdict(r.compiled)}
    return {
        "model": r.run.model.name,
        "method": r.run.config.method["name"],
        "mesh": dict(r.run.mesh.shape),
        "target": r.target.name,
        "memory_bytes": r.target.memory,
        "formula": {name: formula for name, formula, _ in table},
        "compiled": programs,
        "formula_over_compiled": {name: formula / compiled for name, formula, compiled in table if compiled},
        "flops": dataclasses.asdict(r.flops),
        "roofline": r.roofline and dataclasses.asdict(r.roofline),
        "needed_bytes": r.needed,
        "fits": r.fits,
        "missing_bytes": max(0, r.needed - r.target.memory),
        "notes": list(r.run.notes),
        "advice": [{**advice._asdict(), "option": advice.option._asdict()} for advice in r.advice],
    }
