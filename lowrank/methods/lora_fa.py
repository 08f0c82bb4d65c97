"""LoRA with A frozen."""

import dataclasses
from typing import Any

from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.methods.lora import lora
from lowrank.methods.method import Export, Method
from lowrank.methods.options import with_options_of


@with_options_of(lora)
def lora_fa(**kwargs: Any) -> Method:
    """LoRA-FA: LoRA's options, with A kept as it was drawn and B trained (Zhang et al. 2023, arXiv:2308.03303).

    Half of the parameters to learn, and no backward pass needs the layer's whole input `[..., in]`, only its
    product with A, `[..., r]`.
    """
    if kwargs.get("init") == "zero_a":
        raise UserError("LoRA-FA freezes A: with init=zero_a nothing would ever be learned")
    method = config_schema.call_with_group(lora, kwargs, "method")
    [(target, _)] = method.rules
    kept = (f"(?:{target})/a",)
    hooks = dataclasses.replace(method.hooks, freeze=kept)
    return dataclasses.replace(method, export=Export(frozen=kept), hooks=hooks)
