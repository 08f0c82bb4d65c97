"""LongLoRA as a method: LoRA on longer rows than the base has seen, at the cost of attention within groups."""

import dataclasses
from typing import Any

from lowrank.core import config_schema
from lowrank.core.errors import UserError
from lowrank.methods.lora import lora
from lowrank.methods.method import Method
from lowrank.methods.options import with_options_of

NORMS, EMBEDDINGS = r"(.*/)?\w*norm/(scale|bias)", r"embed/embedding"


@with_options_of(lora)
def longlora(
    group: int = 64,
    norms: bool = True,
    embeddings: bool = True,
    factor: float = 1.0,
    target: str = r".*attn/(q|k|v|o)/kernel",
    **kwargs: Any,
) -> Method:
    """LongLoRA (Chen et al. 2024, arXiv:2309.12307): LoRA's options, with trained norms and embeddings, on decoders.

    While training, tokens attend within groups of `group` tokens (a quarter of a row in the paper), which are shifted
    by half of one in half of the heads; scores and generated texts are of full attention. A `factor` above 1
    interpolates positions as the paper does (Chen et al. 2023, arXiv:2306.15595): they are divided by it, so that rows
    may be `factor` times as long as the base's positions, in training and after it. It is rope's `linear` scaling, and
    goes on top of a scaling that the base has.
    """
    if group < 2 or group % 2:
        raise UserError(f"method.group must be a positive even number of tokens, not {group}")
    if factor < 1:
        raise UserError(f"method.factor must be at least 1, not {factor}")
    method = config_schema.call_with_group(lora, {"target": target, **kwargs}, "method")
    train = (*((NORMS,) if norms else ()), *((EMBEDDINGS,) if embeddings else ()))
    model = {"shift_group": group} | ({"position_factor": factor} if factor > 1 else {})
    return dataclasses.replace(method, model_options=model, trainable=(*method.trainable, *train))
