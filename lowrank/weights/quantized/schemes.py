"""The quantization schemes by name: each builds, from its options, a function from a kernel to a quantized form."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax

from lowrank.core.errors import UserError, unknown
from lowrank.weights.quantized import codebook, int8, mixed, uniform

Quantizer = Callable[[jax.Array], Any]  # kernel [..., in, out] -> a form that stores it


def nf4(block: int = 64, double: bool = False, calibrate: int = 0) -> Quantizer:
    """NF4; `double` quantizes the scales to 8 bits, and `calibrate` is n, for `2 n + 1` shifts to try per block."""
    if calibrate < 0:
        raise UserError(f"quantize.calibrate must not be negative, not {calibrate}")
    return partial(codebook.quantize, table="nf4", block=_block(block), double=double, calibrate=calibrate)


def fp4(block: int = 64, double: bool = False) -> Quantizer:
    """FP4; `double` quantizes the scales to 8 bits."""
    return partial(codebook.quantize, table="fp4", block=_block(block), double=double)


def integer(bits: int = 4, block: int = 64, symmetric: bool = True) -> Quantizer:
    """Evenly spaced codes of 2, 4 or 8 bits in groups of `block` inputs; 0 stands for one group per output."""
    if bits not in uniform.BITS:
        raise UserError(f"quantize.bits must be one of {', '.join(map(str, uniform.BITS))}, not {bits}")
    return partial(
        uniform.quantize_symmetric if symmetric else uniform.quantize_asymmetric, bits=bits, block=_block(block, 0)
    )


def int4(block: int = 64, symmetric: bool = True) -> Quantizer:
    """Evenly spaced codes of 4 bits in groups of `block` inputs; 0 stands for one group per output."""
    return integer(4, block, symmetric)


def fp8(format: str = "e4m3") -> Quantizer:
    """8-bit floats, `e4m3` or `e5m2`, with one scale per output."""
    if format not in int8.FLOATS:
        raise unknown("quantize.format", format, int8.FLOATS)
    return partial(int8.quantize_fp8, float_format=format)


def llm_int8(outliers: int = 8) -> Quantizer:
    """int8, with the `outliers` inputs that have the largest weights in bfloat16."""
    if outliers < 1:
        raise UserError(f"quantize.outliers must be at least 1, not {outliers}")
    return partial(int8.quantize_llm_int8, outliers=outliers)


def mixed_bits(budget: float = 3.5, block: int = 64, double: bool = True) -> Quantizer:
    """NF4 and two bits by groups of `block` inputs, with at most `budget` bits per weight, scales included.

    Two bits have no code for 0, so with `double` a group of zeros is 0 only up to the error of its 8-bit scale.
    """
    if not 2 <= budget <= 4:
        raise UserError(f"quantize.budget must be from 2 to 4 bits per weight, not {budget}")
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


def jit_quantizer(quantizer: Quantizer) -> Quantizer:
    """The quantizer under jit. Equal options share one program, so that a second model compiles nothing anew."""
    if isinstance(quantizer, partial) and not quantizer.args:
        return _jit_with_options(quantizer.func, tuple(sorted(quantizer.keywords.items())))
    return jax.jit(quantizer)


@lru_cache(maxsize=64)
def _jit_with_options(quantize: Quantizer, options: tuple[tuple[str, Any], ...]) -> Quantizer:
    return jax.jit(partial(quantize, **dict(options)))


def scheme_group(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The config group `{name: ..., option: ...}` of a scheme, for which its name alone may stand; empty for None."""
    return {"name": given} if isinstance(given, str) else dict(given or {})


def _block(block: int, least: int = 4) -> int:
    """`block`, which must be a multiple of 4 so that it fills its bytes for any number of bits."""
    if block < least or block % 4:
        raise UserError(f"quantize.block must be a multiple of 4, at least {least}, not {block}")
    return block
