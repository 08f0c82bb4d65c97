"""The plan of a study: its cells are checked, and listed with what each computes and whether it fits."""

from collections.abc import Iterator
from typing import NamedTuple

import jax

from launch import preflight
from lowrank.core.errors import plural
from lowrank.memory import devices, flops, formulas
from lowrank.memory.report import format_bytes
from lowrank.memory.shapes import step_inputs
from lowrank.sweeps.cells import Cell
from lowrank.sweeps.check import checked_runs
from lowrank.sweeps.study import Study


class Cost(NamedTuple):
    """What a cell computes and takes, by formula."""

    cell: Cell
    steps: int
    tokens: float  # of a step, on all devices
    operations: float  # of all steps, on all devices
    memory: int  # bytes on each device
    room: int  # bytes that each device has

    @property
    def fits(self) -> bool:
        """Whether the devices have the memory that it takes."""
        return self.memory <= self.room


def check(study: Study) -> int:
    """Checks every cell of a study; returns 0. Raises UserError naming the first one that cannot run."""
    for _ in checked_runs(study.cells()):
        pass
    return 0


def show(study: Study, target: devices.Target | None) -> int:
    """Prints the cells with their costs; returns 1 if one does not fit, else 0."""
    costs = list(cell_costs(study, target))
    print(_text(study, costs))
    return 0 if all(cost.fits for cost in costs) else 1


def cell_costs(study: Study, target: devices.Target | None) -> Iterator[Cost]:
    """The cost of each cell. Raises UserError naming the first cell that cannot run."""
    for cell, run in checked_runs(study.cells(), _mesh_devices(target)):
        inputs = step_inputs(run)
        operations = run.config.steps * flops.step_flops(run, inputs).executed
        room = (target or devices.local_target(list(run.mesh.devices.flat))).memory
        memory = formulas.estimate_memory(run, inputs).peak
        yield Cost(cell, run.config.steps, run.tokens_per_step, operations, memory, room)


def _mesh_devices(target: devices.Target | None) -> list | None:
    """The devices of the target's meshes: those to compile for, or as many stand-ins on this machine."""
    if target is None:
        return None
    return preflight.compile_only_devices(target) or jax.devices()[: target.num_devices]


def _text(study: Study, costs: list[Cost]) -> str:
    lines = [["cell", "steps", "tokens/step", "TFLOP", "memory", "fits", "point"]]
    for cost in costs:
        fits = "yes" if cost.fits else f"no: {format_bytes(cost.room)}"
        figures = [f"{cost.steps}", f"{cost.tokens:.0f}", f"{cost.operations / 1e12:.4g}", format_bytes(cost.memory)]
        lines.append([cost.cell.key, *figures, fits, cost.cell.label])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(f"{word:{width}}" for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    total = sum(cost.operations for cost in costs)
    steps = sum(cost.steps for cost in costs)
    return "\n".join([*table, f"{study.name}: {plural(len(costs), 'cell')}, {plural(steps, 'step')}, {total:.4g} FLOP"])
