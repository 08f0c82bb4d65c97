"""LoRA-FA as a method: LoRA with A frozen."""

import dataclasses
from typing import Any

from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.methods.lora import lora
from lowrank.methods.method import Export, Method
from lowrank.methods.options import with_options_of


@with_options_of(lora)
def lora_fa(**kwargs: Any) -> Method:
    """LoRA-FA: LoRA with a random, frozen A and a trained B (Zhang et al. 2023, arXiv:2308.03303).

    Takes the options of `lora`. About half of the parameters are trained. The backward pass does not need the input
    of the layer `[..., in]`, only its product with A, `[..., r]`.

    Differs from the paper: A is Kaiming uniform, not normal. Its second version also multiplies the gradient of B by
    `(r / alpha)^2 (A^T A)^-1` (in the layout of this package) before the optimizer, as PEFT's `LoraFAOptimizer` does.
    """
    if kwargs.get("init") == "zero_a":
        raise UserError(
            "method.init=zero_a would leave LoRA-FA without a gradient, as A stays zero: choose another init"
        )
    method = config_schema.call_with_group(lora, kwargs, "method")
    [(target, _)] = method.rules
    kept = (f"(?:{target})/a",)
    hooks = dataclasses.replace(method.hooks, freeze=kept)
    return dataclasses.replace(method, export=Export(frozen=kept), hooks=hooks)
