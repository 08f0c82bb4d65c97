"""The settings with which a run takes the least time on a slice: microbatches, rematerialization and mesh.

Every combination is counted by formula, and those that fit are ordered by the bound on their time, which is no
measurement. The first of them are compiled. The batch and the numbers of the run stay as they are.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank.core import config_file, sharding
from lowrank.core.errors import UserError
from lowrank.memory import flops, formulas, roofline, traffic
from lowrank.memory.advice import abstract_mesh
from lowrank.memory.devices import Target
from lowrank.memory.formulas import Memory
from lowrank.memory.report import format_bytes
from lowrank.memory.roofline import Roofline
from lowrank.memory.shapes import step_inputs
from lowrank.training.build import build_run
from lowrank.training.run import Run

REMAT = ("none", "dots", "full")  # from the most memory to the least


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Changes of a config, the memory of each device by formula, and the bound on the time of a step."""

    changes: Mapping[str, Any]
    memory: Memory
    bound: Roofline
    compiled: int | None = None  # the bytes on each device as compiled, of the first candidates that fit by formula

    @property
    def flags(self) -> str:
        """The changes as flags of a command."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())

    @property
    def order(self) -> tuple[float, ...]:
        """The bound; among equal bounds, the sum of what each resource needs, then the memory."""
        b = self.bound
        return b.step, b.compute + b.memory + b.links, self.memory.peak


def candidates(config: Mapping[str, Any], target: Target, devices: list[Any]) -> list[Candidate]:
    """All combinations that fit the memory of `target` by formula, the one with the least bound first.

    `devices` are any devices that the runs can be described on; nothing is computed. Raises UserError for a config that
    cannot run and for a target whose chips' figures are not known.
    """
    check_target(target)
    mesh = config.get("mesh", {})
    alone = build_run({**config, "mesh": {"data": 1}}, devices[:1], planned=True)
    found = []
    for remat in REMAT:
        changes = config_file.with_changes(vars(alone.config), {"model.remat": remat, "model.remat_names": ()})
        run = build_run(changes, devices[:1], like=alone)
        found += [c for c in _on_meshes(run, target, mesh) if c.memory.peak <= target.memory]
    return sorted(found, key=lambda c: c.order)


def check_target(target: Target | None) -> Target:
    """The target. Raises UserError where there is none, or the figures of its chips are not known."""
    if not target or not target.tpu:
        raise UserError("--search orders runs by the figures of TPU chips: give --topology=v5e:4x4 or another slice")
    return target


def _on_meshes(run: Run, target: Target, given: Mapping[str, int]) -> Iterator[Candidate]:
    """The run on every mesh of the target's devices, in every number of microbatches; `given` is the config's mesh."""
    rows, tokens = run.loader.shapes["tokens"][0][0], run.loader.shapes["tokens"][0][-1]
    for sizes in meshes(run, target.num_devices, given.get("num_slices", 1)):
        mesh = abstract_mesh(**sizes)
        for parts in divisors(rows // sharding.num_batch_shards(mesh)):
            try:
                sharding.check_batch_shape(rows, tokens, parts, mesh)
            except UserError:
                continue
            varied = dataclasses.replace(run, mesh=mesh, optim=dataclasses.replace(run.optim, accumulate=parts))
            named = {axis: size for axis, size in sizes.items() if size > 1 or axis in ("data", *given)}
            yield _candidate(varied, target, named)


def meshes(run: Run, devices: int, slices: int = 1) -> Iterator[dict[str, int]]:
    """The sizes of the axes of every mesh of `devices` that shards `run` evenly: its rows, heads and tokens."""
    c, rows = run.network.config, run.loader.shapes["tokens"][0][0]
    heads = getattr(c, "kv_heads", c.heads)
    for data, fsdp, context in itertools.product(divisors(devices), repeat=3):
        tensor, rest = divmod(devices, data * fsdp * context)
        if rest or tensor < 1 or heads % tensor or rows % (data * fsdp) or data % slices:
            continue
        yield {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def divisors(n: int) -> list[int]:
    """The divisors of `n`, in order."""
    return [k for k in range(1, n + 1) if n % k == 0]


def _candidate(run: Run, target: Target, mesh: Mapping[str, int]) -> Candidate:
    inputs = step_inputs(run)
    memory, operations = formulas.estimate_memory(run, inputs), flops.step_flops(run, inputs)
    bound = roofline.bound(target, run, operations, memory, traffic.moved_bytes(run, inputs))
    assert bound
    changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    remat = {"model.remat": run.network.config.remat, "optim.accumulate": run.optim.accumulate}
    return Candidate({**changes, **remat}, memory, bound)


def to_text(found: list[Candidate], target: Target, shown: int = 8) -> str:
    """The candidates as a table, and the flags of the first one that fits as compiled, or else by formula."""
    best = chosen(found, target)
    if best is None:
        return f"no mesh, rematerialization and number of microbatches fits {target.name}"
    lines = [f"{'bound s':>9}{'MFU':>7}{'formula':>11}{'compiled':>11}  settings"]
    for c in found[:shown]:
        compiled = "" if c.compiled is None else format_bytes(c.compiled)
        lines.append(f"{c.bound.step:9.3g}{c.bound.mfu:7.1%}{format_bytes(c.memory.peak):>11}{compiled:>11}  {c.flags}")
    how = "compiled" if best.compiled is not None else "by formula"
    return "\n".join([*lines, f"{len(found)} fit by formula; the first that fits {target.name} ({how}):", best.flags])


def chosen(found: list[Candidate], target: Target) -> Candidate | None:
    """The first candidate that fits as compiled, or the first one of all if none was compiled."""
    if all(c.compiled is None for c in found):
        return next(iter(found), None)
    return next((c for c in found if c.compiled is not None and c.compiled <= target.memory), None)


def to_json(found: list[Candidate], target: Target) -> dict[str, Any]:
    """The candidates as JSON values, and the changes of the chosen one."""
    best = chosen(found, target)
    rows = [
        {"changes": dict(c.changes), "formula": c.memory.peak, "compiled": c.compiled, **dataclasses.asdict(c.bound)}
        for c in found
    ]
    return {"target": target.name, "memory_bytes": target.memory, "chosen": best and dict(best.changes), "found": rows}
