"""What methods share that quantize the kernels they target themselves."""

from collections.abc import Mapping
from typing import Any

import jax

from lowrank.core import config_schema
from lowrank.core.errors import UserError, unknown
from lowrank.core.weight import is_weight
from lowrank.weights.quantized.schemes import SCHEMES, Quantizer, jit_quantizer, scheme_group

LINEAR = r"(layers|top)/(attn|mlp)/(q|k|v|qkv|o|gate|up|gate_up|down)/kernel"


def quantizer(group: Mapping[str, Any] | str) -> Quantizer:
    """The quantizer of a scheme `{'name': 'nf4', ...}` or its name; UserError for an unknown name or key."""
    options = scheme_group(group)
    name = options.pop("name", None)
    if name not in SCHEMES:
        raise unknown("method.quantize", name, SCHEMES)
    return jit_quantizer(config_schema.call_with_group(SCHEMES[name], options, "method.quantize"))


def check_plain(method: str, name: str, w: Any) -> None:
    """Raises UserError for a kernel that is a form, or that is not finite."""
    if is_weight(w):
        raise UserError(f"{method} starts from a plain kernel; {name} is a {w.title}")
    check_finite(name, w)


def check_finite(name: str, w: Any) -> None:
    """Raises UserError for a kernel with NaN or infinite values. A kernel that is only a shape passes."""
    if not is_weight(w) and not isinstance(w, jax.core.Tracer) and not jax.numpy.isfinite(w).all():
        raise UserError(f"{name} holds NaN or infinite values: it cannot be quantized")
