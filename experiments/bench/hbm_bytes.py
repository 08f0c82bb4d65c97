"""The bytes that a compiled TPU program moves to and from HBM, loops times their trips, read from its schedule.

XLA's own count takes one trip of a loop, and takes what lies in VMEM for HBM. Here each instruction counts those of its
operands and results that lie in HBM, once each: a slice counts as its size, an update in place as that of the update,
and a Pallas kernel as its cost estimate where it has one. What an instruction reads twice itself, as a large product
does, is not counted twice; neither is padding.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lowrank.memory.collectives import computations_of, trips_of

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"^(.*?) ([a-z][a-z-]*)\((.*)$")
SLICES = ("dynamic-slice", "slice", "gather")
VIEWS = ("bitcast", "reshape", "get-tuple-element")
FREE = (
    *("parameter", "constant", "tuple", "after-all", "partition-id", "optimization-barrier"),
    *("copy-done", "slice-done", "async-done", "async-update", "all-gather-done", "all-reduce-done"),
    *("collective-permute-done", *VIEWS),
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # with its layout, in which S(1) and above are not HBM
    opcode: str
    operands: list[str]
    rest: str  # the line from the operands on


class Program(NamedTuple):
    """The text of each computation, and a computation's instructions, of which the last is the root."""

    texts: Mapping[str, Mapping[str, str]]
    chunks: int

    def instructions(self, computation: str) -> dict[str, Instruction]:
        """`name -> instruction`."""
        return {name: _instruction(name, text) for name, text in self.texts[computation].items()}


def hbm_bytes(text: str, chunks: int = 1) -> int:
    """The bytes of the program whose optimized HLO `compiled.as_text()` is `text`.

    `chunks` is the number of trips of a loop whose bound is computed by the program itself.
    """
    entry, texts = computations_of(text)
    return round(_computation_bytes(Program(texts, chunks), entry))


def _instruction(name: str, text: str) -> Instruction:
    found = INSTRUCTION.match(text)
    assert found, text
    shape, opcode, rest = found.groups()
    return Instruction(name, shape, opcode, re.findall(r"%([\w.-]+)", rest.partition("), ")[0]), rest)


def array_bytes(shape: str) -> float:
    """The bytes of the arrays of a shape, or of a tuple of shapes, that lie in HBM."""
    total = 0.0
    for dtype, sizes, layout in ARRAY.findall(shape):
        if not re.search(r"S\([1-9]\d*\)", layout):
            bits = BITS.get(dtype) if dtype in BITS else int(re.findall(r"\d+", dtype)[0])
            total += math.prod(map(int, filter(None, sizes.split(",")))) * bits / 8
    return total


def _computation_bytes(program: Program, name: str) -> float:
    inside = program.instructions(name)
    return sum(_instruction_bytes(program, inside, i) for i in inside.values())


def _instruction_bytes(program: Program, inside: dict[str, Instruction], i: Instruction) -> float:
    called = dict(re.findall(r"(body|condition|calls|to_apply)=%([\w.-]+)", i.rest))
    if i.opcode in FREE or 'custom_call_target="AllocateBuffer"' in i.rest:
        return 0
    if i.opcode == "while":
        return trips_of(f"{i.opcode}({i.rest}", program.texts, program.chunks) * _computation_bytes(
            program, called["body"]
        )
    if i.opcode == "conditional":
        branches = re.findall(r"%([\w.-]+)", re.findall(r"branch_computations=\{([^}]*)\}", i.rest)[0])
        return max(_computation_bytes(program, branch) for branch in branches)
    if i.opcode == "call" or (i.opcode.endswith("-start") and "calls" in called):
        return _computation_bytes(program, called.get("calls") or called["to_apply"])
    if i.opcode == "fusion":
        return _fusion_bytes(program.instructions(called["calls"]), inside, i)
    estimate = re.search(r'"?bytes_accessed"?: ?"?(\d+)', i.rest) if i.opcode == "custom-call" else None
    if estimate:
        near = sum(_moved(1, shape) - array_bytes(shape) for shape in (i.shape, *(inside[o].shape for o in i.operands)))
        return max(0, int(estimate[1]) - near)  # what lies in VMEM was counted as it was copied there
    if i.opcode == "copy-start":  # its result is (destination, source, context)
        return sum(array_bytes(part) for part in _tuple_parts(i.shape)[:2])
    if i.opcode == "slice-start":  # its result is ((source), destination, context)
        source, part = _tuple_parts(i.shape)[:2]
        return array_bytes(part) + _moved(array_bytes(source), part)
    if i.opcode in SLICES:
        return array_bytes(i.shape) + _moved(array_bytes(inside[i.operands[0]].shape), i.shape)
    if i.opcode == "dynamic-update-slice":
        update = inside[i.operands[1]].shape
        return array_bytes(update) + _moved(array_bytes(i.shape), update)
    return array_bytes(i.shape) + sum(array_bytes(inside[name].shape) for name in i.operands if name in inside)


def _moved(whole: float, part: str) -> float:
    """The bytes of `part` of an array in HBM, or none if the array is not there."""
    return array_bytes(re.sub(r"S\(\d+\)", "", part)) if whole else 0


def _fusion_bytes(fused: dict[str, Instruction], inside: dict[str, Instruction], i: Instruction) -> float:
    root = fused[next(reversed(fused))]
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = sum(_result_bytes(fused, result) for result in results)
    parameters = {int(f.rest.split(")")[0]): f.name for f in fused.values() if f.opcode == "parameter"}
    for number, name in enumerate(i.operands):
        whole = array_bytes(inside[name].shape)
        total += min(whole, sum(_read_bytes(fused, parameters[number], whole))) if whole else 0
    return total


def _result_bytes(fused: dict[str, Instruction], result: Instruction) -> float:
    while result.opcode in VIEWS and result.operands[0] in fused:
        result = fused[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return _moved(array_bytes(result.shape), fused[result.operands[1]].shape)
    return array_bytes(result.shape)


def _read_bytes(fused: dict[str, Instruction], name: str, whole: float) -> Iterator[float]:
    """What each use of a fusion's parameter reads of it."""
    for use in (f for f in fused.values() if name in f.operands):
        if use.opcode in VIEWS or (use.opcode == "fusion" and "output_to_operand_aliasing" in use.rest):
            yield from _read_bytes(fused, use.name, whole)
        elif use.opcode in SLICES and use.operands[0] == name:
            yield _moved(whole, use.shape)
        elif use.opcode != "dynamic-update-slice" or use.operands[0] != name:
            yield whole


def _tuple_parts(shape: str) -> list[str]:
    return [f"{dtype}[{sizes}]{layout}" for dtype, sizes, layout in ARRAY.findall(shape)]
