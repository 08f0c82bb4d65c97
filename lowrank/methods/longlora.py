"""LongLoRA as a method: LoRA on longer rows than those of the base, with attention within groups in training."""

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
    """LongLoRA: LoRA with trained norms and embeddings, on long rows (Chen et al. 2024, arXiv:2309.12307).

    For decoders. Takes the options of `lora`. In training, tokens attend within groups of `group` tokens (a quarter of
    a row in the paper), and half of the heads shift the groups by half a group. Scores and generated texts use full
    attention. A `factor` above 1 interpolates positions as in the paper (Chen et al. 2023, arXiv:2306.15595): positions
    are divided by it, so that rows may be `factor` times as long as the base's positions, in training and after it.
    This is `model.rope=linear` with a `model.context` of so many times the base's; other ways to stretch RoPE are
    chosen there, with a factor of 1. A base whose RoPE is scaled already is refused.

    Differs from the paper: the first and the last shifted group are half as long, as in the authors' code with
    FlashAttention (dvlab-research/LongLoRA). The paper, and their code without it, roll the tokens, so that the first
    ones see the last. The number of tokens in a group is fixed, not a share of the row.
    """
    if group < 2 or group % 2:
        raise UserError(f"method.group must be a positive even number of tokens, not {group}")
    if factor < 1:
        raise UserError(f"method.factor must be at least 1, not {factor}")
    method = config_schema.call_with_group(lora, {"target": target, **kwargs}, "method")
    train = (*((NORMS,) if norms else ()), *((EMBEDDINGS,) if embeddings else ()))
    model = {"shift_group": group} | ({"position_factor": factor} if factor > 1 else {})
    return dataclasses.replace(method, model_options=model, trainable=(*method.trainable, *train))
