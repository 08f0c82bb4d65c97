"""Broken files: values of a JSON of wrong types and sizes, and bytes of a file changed.

All that is random comes from one generator, whose seed Hypothesis draws: a failure is repeated by one number, and no
strategy depends on what was drawn before.
"""

import copy
import json
import struct
from random import Random
from typing import Any

ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 10**5, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**12, -(2**63)),
    *(0.5, 1.0, -0.0, 1e308, 1e-300, float("nan"), float("inf"), 10**400),
    *("", "x", "16", "silu", "</s>", "\ud800", "\x00", "x" * 5000, "(a+)+$", "(", "../x", "{% for %}"),
    *([], [0], [None], ["x"], [[]], [1.5], [True] * 3, [2**40], {}, {"a": 1}, {"content": "</s>"}, {"content": 3}),
    *({"x": None}, {"": {}}, {"type": "linear"}, {"rope_type": "llama3", "factor": 8}, {"quant_method": "lowrank"}),
]
Path = tuple[Any, ...]


def paths(value: Any, at: Path = ()) -> list[Path]:
    """The place of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, x in items for place in [(*at, key), *paths(x, (*at, key))]]


def changed_json(rng: Random, value: Any, keys: tuple[str, ...] = ()) -> Any:
    """A JSON value in which up to three values are odd, moved, doubled, wrapped or gone; `keys` are further keys."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if keys and isinstance(value, dict) and rng.random() < 0.5:
            value[rng.choice(keys)] = copy.deepcopy(rng.choice(ODD))
            continue
        places = paths(value)
        if not places or rng.randint(0, 60) == 0:
            return rng.choice(ODD)
        *outer, key = rng.choice(places)
        holder = value
        for step in outer:
            holder = holder[step]
        action = rng.choice(["odd"] * 6 + ["gone", "wrapped", "moved", "text"])
        if action == "gone":
            del holder[key]
        elif action == "wrapped":
            holder[key] = rng.choice([[holder[key]], {"x": holder[key]}])
        elif action == "text":
            holder[key] = str(holder[key])
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def changed_bytes(rng: Random, data: bytes, header: int | None = None) -> bytes:
    """A file with a few bytes changed, cut off, left out or put in, most often in its first `header` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        end = len(out) if rng.randint(0, 5) == 0 else min(len(out), header or len(out))
        at = rng.randint(0, max(end - 1, 0))
        action = rng.choice(["byte"] * 6 + ["word", "cut", "left out", "put in"])
        if action == "byte" and out:
            out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, (out[at] + 1) % 256, out[at] ^ 0x20])
        elif action == "word":
            out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1]))
        elif action == "cut":
            del out[at:]
        elif action == "left out":
            del out[at : at + rng.randint(1, 16)]
        else:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(out)


def changed_text(rng: Random, text: str, keys: tuple[str, ...] = ()) -> bytes:
    """A JSON file with odd values, or with changed bytes."""
    if rng.randint(0, 4) == 0:
        return changed_bytes(rng, text.encode())
    return dump(changed_json(rng, json.loads(text), keys))


def changed_safetensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file with odd values in its header, or with changed bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    if rng.randint(0, 2) == 0:
        return changed_bytes(rng, data, 8 + size)
    header = dump(changed_json(rng, json.loads(data[8 : 8 + size])))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def dump(value: Any) -> bytes:
    """The JSON of a value; a lone surrogate is written as an escape, and NaN as Python's library does."""
    return json.dumps(value).encode()
