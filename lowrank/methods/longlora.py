"""LongLoRA as a method: LoRA on longer rows than the base has seen, at the cost of attention within groups."""

import dataclasses
from typing import Any

from lowrank import settings
from lowrank.errors import UserError
from lowrank.methods.lora import lora
from lowrank.methods.method import Method

NORMS, EMBEDDINGS = r"(.*/)?\w*norm/(scale|bias)", r"embed/embedding"


def longlora(
    group: int = 64,
    norms: bool = True,
    embeddings: bool = True,
    target: str = r".*attn/(q|k|v|o)/kernel",
    **kwargs: Any,
) -> Method:
    """LongLoRA (Chen et al. 2024, arXiv:2309.12307): LoRA's options, with trained norms and embeddings, on decoders.

    While training, tokens attend within groups of `group` tokens (a quarter of a row in the paper), which are shifted
    by half of one in half of the heads; scores and generated texts are of full attention. Rows stay within the base's
    positions: the paper's interpolation of positions beyond them is not part of this.
    """
    if group < 2 or group % 2:
        raise UserError(f"method.group must be a positive even number of tokens, not {group}")
    method = settings.call(lora, {"target": target, **kwargs}, "method")
    train = (*((NORMS,) if norms else ()), *((EMBEDDINGS,) if embeddings else ()))
    return dataclasses.replace(method, model={"shift_group": group}, train=(*method.train, *train))
