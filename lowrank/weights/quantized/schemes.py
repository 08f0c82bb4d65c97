"""The quantisers by name: each makes, from its options, a function from a kernel `[..., in, out]` to a form."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax

from lowrank.core.errors import UserError, unknown
from lowrank.weights.quantized import codebook, int8, mixed, uniform

Quantizer = Callable[[jax.Array], Any]  # kernel [..., in, out] -> a form that stores it


def nf4(block: int = 64, double: bool = False, calibrate: int = 0) -> Quantizer:
    """NF4; `double` keeps the blocks' magnitudes in 8 bits, `calibrate` tries so many shifts of each block."""
    if calibrate < 0:
        raise UserError(f"quantize.calibrate must not be negative, not {calibrate}")
    return partial(codebook.quantize, table="nf4", block=_block(block), double=double, calibrate=calibrate)


def fp4(block: int = 64, double: bool = False) -> Quantizer:
    """FP4; `double` as for NF4."""
    return partial(codebook.quantize, table="fp4", block=_block(block), double=double)


def integer(bits: int = 4, block: int = 64, symmetric: bool = True) -> Quantizer:
    """Evenly spaced codes of 2, 4 or 8 bits in groups of `block` inputs; 0: one group an output."""
    if bits not in uniform.BITS:
        raise UserError(f"quantize.bits must be one of {', '.join(map(str, uniform.BITS))}, not {bits}")
    return partial(
        uniform.quantize_symmetric if symmetric else uniform.quantize_asymmetric, bits=bits, block=_block(block, 0)
    )


def int4(block: int = 64, symmetric: bool = True) -> Quantizer:
    """Evenly spaced codes of 4 bits in groups of `block` inputs; 0: one group an output."""
    return integer(4, block, symmetric)


def fp8(format: str = "e4m3") -> Quantizer:
    """8-bit floats, `e4m3` or `e5m2`, with a scale for each output."""
    if format not in int8.FLOATS:
        raise unknown("quantize.format", format, int8.FLOATS)
    return partial(int8.quantize_fp8, float_=format)


def llm_int8(outliers: int = 8) -> Quantizer:
    """int8, and the `outliers` widest inputs in bfloat16."""
    if outliers < 1:
        raise UserError(f"quantize.outliers must be at least 1, not {outliers}")
    return partial(int8.quantize_llm_int8, outliers=outliers)


def mixed_bits(budget: float = 3.5, block: int = 64, double: bool = True) -> Quantizer:
    """NF4 and two bits by groups of `block` inputs: at most `budget` bits a weight, all scales counted.

    Two bits have no code for 0: with `double`, a group of zeros is 0 but for the error of an 8-bit magnitude.
    """
    if not 2 <= budget <= 4:
        raise UserError(f"quantize.budget must be from 2 to 4 bits a weight, not {budget}")
    return partial(mixed.quantize_within_budget, budget=budget, block=_block(block), double=double)


SCHEMES: dict[str, Callable[..., Quantizer]] = {
    "nf4": nf4,
    "fp4": fp4,
    "int8": lambda: int8.quantize_int8,
    "llm_int8": llm_int8,
    "int4": int4,
    "integer": integer,
    "fp8": fp8,
    "ternary": lambda: uniform.quantize_ternary,
    "mixed": mixed_bits,
}


def jit_quantizer(make: Quantizer) -> Quantizer:
    """`make` under jit, the same program for the same options: a second model is not compiled for again."""
    if isinstance(make, partial) and not make.args:
        return _compiled(make.func, tuple(sorted(make.keywords.items())))
    return jax.jit(make)


@lru_cache(maxsize=64)
def _compiled(make: Quantizer, options: tuple[tuple[str, Any], ...]) -> Quantizer:
    return jax.jit(partial(make, **dict(options)))


def scheme_group(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """A group `{name: ..., option: ...}`, which a name alone may stand for; empty if there is none."""
    return {"name": given} if isinstance(given, str) else dict(given or {})


def _block(block: int, least: int = 4) -> int:
    """A block that fills its bytes whatever the bits."""
    if block < least or block % 4:
        raise UserError(f"quantize.block must be a multiple of 4, at least {least}, not {block}")
    return block
