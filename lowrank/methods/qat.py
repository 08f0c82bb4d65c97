"""Quantization-aware training as a method: kernels that are rounded in training."""

from collections.abc import Mapping
from typing import Any

import jax

from lowrank.core.errors import UserError
from lowrank.methods import targets
from lowrank.methods.method import Method
from lowrank.methods.quantized_base import LINEAR, check_plain, quantizer
from lowrank.weights.quantized import fake_quantized
from lowrank.weights.quantized.schemes import scheme_group


def qat(target: str = LINEAR, quantize: Mapping[str, Any] | str = "int4", activations: int = 0) -> Method:
    """Quantization-aware training of the targeted kernels; see `lowrank.weights.quantized.fake_quantized`.

    `quantize` is a scheme or its name. `activations` is the number of bits that inputs are rounded to, 0 for none.

    Differs from the paper: only the targets are rounded, in blocks that have their own scales, and from the first step
    on; the range of an input is its token's largest magnitude, not a moving average over the steps (Jacob et al. 2018).
    """
    quantizer(quantize)
    if activations and not 2 <= activations <= 8:
        raise UserError(f"method.activations must be 0 or 2 to 8 bits, not {activations}")
    group = scheme_group(quantize)
    scheme, options = group.pop("name"), tuple(sorted(group.items()))

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        del key
        targets.check_kernel(name)
        check_plain("QAT", name, w)
        return fake_quantized.attach(w, scheme=scheme, options=options, activations=activations)

    return Method(rules=((target, adapt),))
