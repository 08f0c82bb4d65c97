"""Memory as the compiler plans it: the run's programs compiled for abstract arrays, with no weight in sight."""

import dataclasses
import re
from collections.abc import Callable

import jax

from lowrank.core import tree
from lowrank.core.typing import PyTree
from lowrank.memory.shapes import StepInputs, step_inputs
from lowrank.training import step
from lowrank.training.run import Run

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """Bytes on each device, by `memory_analysis`."""

    arguments: int = 0
    temporary: int = 0
    outputs: int = 0  # beyond the arguments that they are written over
    code: int = 0
    host: int = 0  # arguments and temporaries in the host's memory
    refused: int = 0  # what the compiler says it would have needed, where there is no room

    @property
    def total(self) -> int:
        """All of it."""
        return self.refused or self.arguments + self.temporary + self.outputs + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler plans for a run. The first four are arguments, as the platform lays them out."""

    platform: str
    weights: int
    adapter: int
    moments: int
    batch: int
    step: Program
    generation: Program | None

    @property
    def peak(self) -> int:
        """The larger program; the optimizer's state stays while texts are written."""
        writing = self.generation.total + self.moments if self.generation else 0
        return max(self.step.total, writing)


def compiled(run: Run, arrays: StepInputs | None = None) -> Compiled:
    """The training step of `run`, and its writing of texts if it has an evaluation that does, compiled for its mesh."""
    r = arrays or step_inputs(run)
    parts = {"weights": r.frozen, "adapter": r.state.trained, "moments": r.state.optimizer, "batch": r.batch}
    optimizer = run.optimizer()
    train = analysed(lambda: step.compile_step(run.step(optimizer), r.state, r.frozen, r.batch))
    texts = run.scorer is not None and bool(run.scorer.prompts)
    params = tree.join(r.state.trained, r.frozen)
    return Compiled(
        platform=run.mesh.devices.flat[0].device_kind,
        **{name: held(part) for name, part in parts.items()},
        step=train,
        generation=analysed(lambda: run.scorer.lowered(params).compile()) if texts else None,
    )


def analysed(compile: Callable[[], jax.stages.Compiled]) -> Program:
    """What `memory_analysis` says of a program, or what the compiler says of one that has no room."""
    try:
        m = compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT]", str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or not found:
            raise
        return Program(refused=int(float(found[1]) * UNITS[found[2]]))
    return Program(
        arguments=m.argument_size_in_bytes,
        temporary=m.temp_size_in_bytes,
        outputs=m.output_size_in_bytes - m.alias_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        host=m.host_argument_size_in_bytes + m.host_temp_size_in_bytes,
    )


def held(arrays: PyTree) -> int:
    """The bytes that arrays take as the arguments of a program that does nothing."""
    leaves = jax.tree.leaves(arrays)
    program = analysed(jax.jit(lambda *leaves: (), keep_unused=True).lower(*leaves).compile)
    return program.arguments
