"""QA-LoRA as a method: updates that merge into integer codes exactly."""

from typing import Any

import jax

from lowrank.core import config_schema
from lowrank.core.errors import UserError, plural
from lowrank.methods import targets
from lowrank.methods.method import Method
from lowrank.methods.quantized_base import LINEAR, check_finite
from lowrank.weights import qa_lora as form
from lowrank.weights.quantized.schemes import SCHEMES, jit_quantizer


def qa_lora(rank: int = 8, alpha: float = 16.0, target: str = LINEAR, block: int = 64, bits: int = 4) -> Method:
    """QA-LoRA on asymmetric integer codes, which it merges into exactly; see `lowrank.weights.qa_lora`.

    `block` inputs share one scale, one zero point and one update. A plain kernel is quantized to `bits`; codes stay as
    they are.

    Differs from the paper: a plain kernel is rounded to the nearest codes, where the authors quantize by GPTQ, and the
    default block has 64 inputs instead of 32. The inputs of a block are summed, as in the paper's algorithm; the
    authors' code (yuhuixu1993/qa-lora) takes their mean, draws A from a Xavier distribution, and has a dropout.
    """
    targets.check_positive(rank=rank, alpha=alpha)
    make: Any = jit_quantizer(
        config_schema.call_with_group(SCHEMES["integer"], {"bits": bits, "block": block, "symmetric": False}, "method")
    )

    def adapt(key: jax.Array, w: Any, name: str) -> Any:
        targets.check_kernel(name)
        check_finite(name, w)
        if rank > min(-(-w.shape[-2] // block), w.shape[-1]):
            raise UserError(
                f"rank {rank} is larger than min(groups, out) of {name}, in groups of {plural(block, 'input')}"
            )
        return form.attach(key, w, rank=rank, alpha=alpha, block=block, quantize=make)

    return Method(rules=((target, adapt),))
