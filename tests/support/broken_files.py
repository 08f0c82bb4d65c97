"""Hypothesis strategies of broken files: values of a JSON of wrong types and sizes, and bytes of a file changed."""

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

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


@st.composite
def changed_json(draw: Any, value: Any, keys: tuple[str, ...] = ()) -> Any:
    """A JSON value in which up to three values are odd, moved, doubled, wrapped or gone; `keys` are further keys."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if keys and isinstance(value, dict) and draw(st.booleans()):
            value[draw(st.sampled_from(keys))] = copy.deepcopy(draw(st.sampled_from(ODD)))
            continue
        places = paths(value)
        if not places or draw(st.integers(0, 60)) == 0:
            return draw(st.sampled_from(ODD))
        *outer, key = draw(st.sampled_from(places))
        holder = value
        for step in outer:
            holder = holder[step]
        action = draw(st.sampled_from(["odd"] * 6 + ["gone", "wrapped", "moved", "text"]))
        if action == "gone":
            del holder[key]
        elif action == "wrapped":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}]))
        elif action == "text":
            holder[key] = str(holder[key])
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return value


@st.composite
def changed_bytes(draw: Any, data: bytes, header: int | None = None) -> bytes:
    """A file with a few bytes changed, cut off, left out or put in, most often in its first `header` bytes."""
    out = bytearray(data)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        end = len(out) if draw(st.integers(0, 5)) == 0 else min(len(out), header or len(out))
        at = draw(st.integers(0, max(end - 1, 0)))
        action = draw(st.sampled_from(["byte"] * 6 + ["word", "cut", "left out", "put in"]))
        if action == "byte" and out:
            out[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, (out[at] + 1) % 256, out[at] ^ 0x20]))
        elif action == "word":
            out[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])))
        elif action == "cut":
            del out[at:]
        elif action == "left out":
            del out[at : at + draw(st.integers(1, 16))]
        else:
            out[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(out)


@st.composite
def changed_text(draw: Any, text: str, keys: tuple[str, ...] = ()) -> bytes:
    """A JSON file with odd values, or with changed bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(changed_bytes(text.encode()))
    return dump(draw(changed_json(json.loads(text), keys)))


@st.composite
def changed_safetensors(draw: Any, data: bytes) -> bytes:
    """A safetensors file with odd values in its header, or with changed bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    if draw(st.integers(0, 2)) == 0:
        return draw(changed_bytes(data, 8 + size))
    header = dump(draw(changed_json(json.loads(data[8 : 8 + size]))))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def dump(value: Any) -> bytes:
    """The JSON of a value; a lone surrogate is written as an escape, and NaN as Python's library does."""
    return json.dumps(value).encode()
