"""ModuLoRA as a method: LoRA on the codes of any quantizer."""

import importlib
from typing import Any

import jax

from lowrank.core.errors import UserError
from lowrank.methods import targets
from lowrank.methods.lora import bind_dropout
from lowrank.methods.method import Method
from lowrank.methods.quantized_base import LINEAR, check_plain
from lowrank.weights import lora as lora_form
from lowrank.weights.quantized import black_box


def modulora(
    quantizer: str = "lowrank.weights.quantized.black_box:absmax",
    rank: int = 8,
    alpha: float = 16.0,
    target: str = LINEAR,
    dropout: float = 0.0,
) -> Method:
    """ModuLoRA: LoRA on the codes of any quantizer, `quantizer='package.module:function'`.

    The function turns a kernel `[in, out]` into `(state, decode)`: arrays, and a module-level function from these
    arrays to the kernel. See `lowrank.weights.quantized.black_box`.

    Differs from the paper: the default quantizer is an example of 8 bits that needs no data, where the authors use OPTQ
    and QuIP# at 2 to 4 bits (Yin et al. 2023, arXiv:2309.16119).
    """
    targets.check_positive(rank=rank, alpha=alpha)
    targets.check_fraction(dropout=dropout)
    quantize = _imported(quantizer)

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        targets.check_rank(name, w.shape, rank)
        check_plain("ModuLoRA", name, w)
        base = black_box.attach(w, quantize, quantizer)
        return lora_form.attach_equal_ranks(key, base, rank=rank, alpha=alpha, dropout=dropout)

    return Method(rules=((target, adapt),), bind=bind_dropout if dropout else None)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"method.quantizer {path!r} cannot be imported as package.module:function: {e}") from None
