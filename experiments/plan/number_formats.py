"""The values of numbers in each format: floats one by one, codes together with the numbers that share their scale."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from experiments.plan.formatting import aligned
from lowrank.core.errors import UserError
from lowrank.weights.quantized.schemes import SCHEMES

FLOATS = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
CODES: dict[str, tuple[int, str, dict[str, Any]]] = {  # bits, scheme and its options; one block of all the numbers
    "fp8, scaled": (8, "fp8", {}),
    "int8": (8, "int8", {}),
    "int4": (4, "int4", {"block": 0}),
    "int2": (2, "integer", {"bits": 2, "block": 0}),
    "nf4": (4, "nf4", {}),
    "fp4": (4, "fp4", {}),
    "ternary": (2, "ternary", {}),
}
WORKED = (("int8", 8, -0.91, 2 / 255), ("int4", 4, -0.91, 2 / 15), ("int2", 2, -0.91, 2 / 3))
EXAMPLE = ("1234.56789",)


def rows(words: Sequence[str]) -> list[dict[str, Any]]:
    """`{value, format, bits, becomes}` of every number in `words`; without any, the worked examples.

    A format without such a number gives nan or inf, as the hardware does. Raises UserError for a word that is not a
    finite number.
    """
    values = _numbers(words or EXAMPLE)
    decoded = {name: _decoded(values, scheme, options) for name, (_, scheme, options) in CODES.items()}
    found = []
    for i, value in enumerate(values):
        found += [_row(value, name, 8 * np.dtype(kind).itemsize, _cast(value, kind)) for name, kind in FLOATS.items()]
        if len(values) > 1:  # one alone is the largest of its block, which codes keep
            found += [_row(value, name, CODES[name][0], decoded[name][i]) for name in CODES]
    return found if words else found + [worked(*example) for example in WORKED]


def worked(name: str, bits: int, value: float, scale: float) -> dict[str, Any]:
    """The code of one number when the scale is given: `round(value / scale)`, kept within `bits`."""
    code = int(np.clip(np.round(value / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return {**_row(value, name, bits, code * scale), "scale": scale, "code": code}


def text(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = ("value", "format", "bits", "becomes", "error")
    lines = [(f"{r['value']:.9g}", _format(r), str(r["bits"]), f"{r['becomes']:.9g}", _error(r)) for r in found]
    return aligned([head, *lines])


def _format(row: dict[str, Any]) -> str:
    return f"{row['format']}, scale {row['scale']:.4g}: code {row['code']}" if "code" in row else row["format"]


def _error(row: dict[str, Any]) -> str:
    gap = abs(row["becomes"] - row["value"])
    return f"{100 * gap / abs(row['value']):.2g} %" if row["value"] and np.isfinite(gap) else ""


def _numbers(words: Sequence[str]) -> list[float]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [np.nan]
    if not np.isfinite(values).all():
        raise UserError(f"formats takes finite numbers, such as 0.1 or -3e4, and not {' '.join(words)!r}")
    return values


def _row(value: float, name: str, bits: int, becomes: float) -> dict[str, Any]:
    return {"value": value, "format": name, "bits": bits, "becomes": float(becomes)}


def _cast(value: float, kind: Callable[..., Any]) -> float:
    with np.errstate(over="ignore"):
        return float(np.asarray(value).astype(kind))


def _decoded(values: Sequence[float], scheme: str, options: dict[str, Any]) -> np.ndarray:
    """The numbers as one block, quantized and dequantized."""
    block = {"block": -(-len(values) // 4) * 4} if scheme in ("nf4", "fp4") else {}
    kernel = jnp.asarray(values, jnp.float32)[:, None]
    return np.asarray(SCHEMES[scheme](**options, **block)(kernel).materialize())[:, 0]
