"""The collectives of a compiled program, read from its HLO text: each one's kind, its bytes, and how often it runs.

A program's text shows the body of a loop once. A collective in a loop runs once a trip, and loops nest, so each one is
counted times the product of the trips of its loops.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # of other types, the digits of their names

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"^(.*?) ({'|'.join(KINDS)})(?:-start)?\((.*?)\)(?:, |$)")
_ARRAY = re.compile(r"\b([a-z]+\d*)[a-z\d]*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind: `count` is how many run in a step, `bytes` what they move on each device.

    The bytes of one collective are those of the larger of its operand and its result.
    """

    count: int = 0
    bytes: int = 0


def collectives(text: str, chunks: int = 1) -> dict[str, Collective]:
    """`{kind: Collective}` of a program's HLO text.

    `chunks` is the number of trips of a loop whose bound is computed by the program itself, as is that of the chunks of
    logits.
    """
    entry, computations = computations_of(text)
    times = _times(entry, computations, chunks)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for name, lines in computations.items():
        for key, kind, size in _moved(lines):
            runs, bytes_of_one = found.get((kind, key), (times[name], 0))
            found[kind, key] = min(runs, times[name]), max(bytes_of_one, size)
    return {kind: _total([of for (k, _), of in found.items() if k == kind]) for kind in KINDS}


def _total(parts: list[tuple[int, int]]) -> Collective:
    return Collective(sum(runs for runs, _ in parts), sum(runs * size for runs, size in parts))


def computations_of(text: str) -> tuple[str, dict[str, dict[str, str]]]:
    """`(name of the entry, {computation: {instruction: its text}})`."""
    entry, found, lines = "", dict[str, dict[str, str]](), dict[str, str]()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            lines[instruction[1]] = instruction[2]
    return entry, found


def _moved(lines: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    """`(key, kind, bytes)` of each collective.

    The parts of one that runs beside other work share their key. Some lie in the loops of that work.
    """
    for name, text in lines.items():
        if found := _COLLECTIVE.match(text):
            channel = re.search(r"channel_id=(\d+)", text)
            operands = [lines.get(_name(word), "").split("(%")[0] for word in found[3].split(", ")]
            yield channel[1] if channel else name, found[2], _array_bytes(" ".join([found[1], *operands]))


def _array_bytes(text: str) -> int:
    """The bytes of the largest array among the types in `text`."""
    return max((_bytes(kind, dims) for kind, dims in _ARRAY.findall(text)), default=0)


def _bytes(kind: str, dims: str) -> int:
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 0)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _times(entry: str, computations: Mapping[str, Mapping[str, str]], chunks: int) -> dict[str, int]:
    """How often each computation runs in one run of the entry."""
    callers: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        for text in lines.values():
            trips = trips_of(text, computations, chunks)
            branches = _BRANCHES.search(text)
            for called in [*_CALLED.findall(text), *(re.findall(r"[\w.\-]+", branches[1]) if branches else [])]:
                callers.setdefault(called, []).append((name, trips))

    @functools.cache
    def times(name: str) -> int:
        return 1 if name == entry else sum(trips * times(caller) for caller, trips in callers.get(name, ()))

    return {name: times(name) for name in computations}


def trips_of(text: str, computations: Mapping[str, Mapping[str, str]], chunks: int) -> int:
    """The trips of a `while` that counts from 0 to a constant in its condition; 1 for other instructions."""
    found = re.search(r"\bwhile\(.*\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)", text)
    if not found:
        return 1
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', text):
        return int(known[1])
    condition, body = computations[found[1]], computations[found[2]]
    compared = re.search(r"compare\((.*?), (.*?)\), direction=LT", " ".join(condition.values()))
    counter, bound = (condition.get(_name(word), "") for word in compared.groups()) if compared else ("", "")
    last, place = _constant(bound), re.search(r"index=(\d+)", counter)
    return chunks if last is None or place is None else -(-last // _increment(body, int(place[1])))


def _increment(body: Mapping[str, str], place: int) -> int:
    """The constant that a trip adds to the value at `place` of the loop's state."""
    root = body[next(reversed(body))]
    result = body.get(_name(root.partition(" tuple(")[2].split(", ")[place]), "")
    addend = re.search(r" add\(.*?, (.*?)\)", result)
    return _constant(body.get(_name(addend[1]), "")) or 1 if addend else 1


def _constant(text: str) -> int | None:
    found = re.search(r" constant\((\d+)\)", text)
    return int(found[1]) if found else None


def _name(operand: str) -> str:
    """The name in an operand, which a comment, a type and `%` may precede."""
    return operand.split("*/")[-1].split(" ")[-1].strip("%()")
