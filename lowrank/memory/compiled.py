"""The memory that the compiler allocates: the programs of a run, compiled for abstract arrays without any weight."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax

from lowrank.core import tree
from lowrank.core.typing import PyTree
from lowrank.memory.collectives import Collective, collectives
from lowrank.memory.shapes import StepInputs, logits_chunks, step_inputs
from lowrank.training import step, texts
from lowrank.training.run import Run

# How a compiler says what a program takes: all of it, or its temporaries alone where these are too large already.
NEEDED = r"(Used |temporaries \()(?P<size>[\d.]+)(?P<unit>[KMGT])( of [\d.]+[KMGT]|\) exceeds available)"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """The memory of a program as `memory_analysis` reports it, in bytes on each device."""

    arguments: int = 0
    temporary: int = 0
    outputs: int = 0  # without those that are written over donated arguments
    code: int = 0
    host: int = 0  # arguments and temporaries in the host's memory
    refused: int = 0  # the memory that the compiler reports as needed where it refuses the program, else 0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """The sum of the parts on the device, or the memory that the compiler reports as needed."""
        return self.refused or self.arguments + self.temporary + self.outputs + self.code

    @property
    def moved(self) -> int:
        """The bytes of all collectives."""
        return sum(of.bytes for of in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The memory of a run's compiled programs, in bytes on each device, with the platform's layout of its arguments."""

    platform: str
    weights: int
    adapter: int
    moments: int
    batch: int
    step: Program
    generation: Program | None

    @property
    def peak(self) -> int:
        """The memory of the larger program; the optimizer's state stays while texts are generated."""
        generation = self.generation.total + self.moments if self.generation else 0
        return max(self.step.total, generation)


def compile_programs(run: Run, inputs: StepInputs | None = None) -> Compiled:
    """The memory of the training step of `run`, and of its generation if it writes texts, compiled for its mesh."""
    r = inputs or step_inputs(run)
    parts = {"weights": r.frozen, "adapter": r.state.trained, "moments": r.state.optimizer, "batch": r.batch}
    optimizer = run.optimizer()
    compile_step = lambda: step.compile_step(run.step(optimizer), r.state, r.frozen, r.batch)  # noqa: E731
    train = analyze_memory(compile_step, logits_chunks(run, r)[0])
    written = _generation(run, tree.join(r.state.trained, r.frozen))
    return Compiled(
        platform=run.mesh.devices.flat[0].device_kind,
        **{name: argument_bytes(part) for name, part in parts.items()},
        step=train,
        generation=analyze_memory(written) if written else None,
    )


def _generation(run: Run, params: PyTree) -> Callable[[], jax.stages.Compiled] | None:
    """Compiles what reads the prompts of a step's texts, or else those of an evaluation's; None without texts."""
    if run.objective.rollout:
        return lambda: texts.lowered(run, params).compile()
    scorer = run.scorer
    return (lambda: scorer.lowered(params).compile()) if scorer and scorer.prompts else None


def analyze_memory(compile_program: Callable[[], jax.stages.Compiled], chunks: int = 1) -> Program:
    """The memory of a program by `memory_analysis`, or by the message of a compiler that refuses it as too large.

    `chunks` is the number of trips of a loop whose bound the program computes.
    """
    try:
        program = compile_program()
        m = program.memory_analysis()
    except jax.errors.JaxRuntimeError as e:
        used = re.search(NEEDED, str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or not used:
            raise
        return Program(refused=int(float(used["size"]) * UNITS[used["unit"]]))
    assert m is not None
    return Program(
        arguments=m.argument_size_in_bytes,
        temporary=m.temp_size_in_bytes,
        outputs=m.output_size_in_bytes - m.alias_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        host=m.host_argument_size_in_bytes + m.host_temp_size_in_bytes,
        collectives=collectives(program.as_text() or "", chunks),
    )


def argument_bytes(arrays: PyTree) -> int:
    """The bytes of arrays on each device as arguments of a program, in the platform's layout."""
    leaves = jax.tree.leaves(arrays)
    program = analyze_memory(jax.jit(lambda *leaves: (), keep_unused=True).lower(*leaves).compile)
    return program.arguments
