"""IR-QLoRA as a method: LoRA on NF4 codes that are calibrated to keep the most information."""

from typing import Any

import jax

from lowrank.core.weight import is_weight
from lowrank.methods import targets
from lowrank.methods.lora import bind_dropout
from lowrank.methods.method import Method
from lowrank.methods.quantized_base import LINEAR, check_finite, quantizer
from lowrank.weights import ir_qlora as form
from lowrank.weights import lora as lora_form


def ir_qlora(
    rank: int = 8,
    alpha: float = 16.0,
    target: str = LINEAR,
    block: int = 64,
    double: bool = True,
    calibrate: int = 100,
    dropout: float = 0.0,
) -> Method:
    """IR-QLoRA: LoRA with a shortcut of averaged inputs, on NF4 codes that keep the most information.

    The median of each block and `calibrate` shifts on each side of it are tried (Qin et al. 2024, arXiv:2402.05445);
    see `lowrank.weights.quantized.codebook` and `lowrank.weights.ir_qlora`. A base that is in codes already
    (`model.quantize`) stays as it is.

    Differs from the paper: its formulas are followed where the authors' code (htqin/IR-QLoRA) departs from them. The
    code takes 0.054 absmax of a block for 0.1 of its deviations, and averages and repeats neighboring entries instead
    of runs. Dropout acts on the averaged inputs too, which the code keeps whole. A block runs along the inputs of one
    output.
    """
    targets.check_positive(rank=rank, alpha=alpha, calibrate=calibrate)
    targets.check_fraction(dropout=dropout)
    make = quantizer({"name": "nf4", "block": block, "double": double, "calibrate": calibrate})

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        targets.check_rank(name, w.shape, rank)
        check_finite(name, w)
        base = w if is_weight(w) else jax.lax.map(make, w) if len(w.shape) == 3 else make(w)
        return form.attach(lora_form.attach_equal_ranks(key, base, rank=rank, alpha=alpha, dropout=dropout))

    return Method(rules=((target, adapt),), bind=bind_dropout if dropout else None)
