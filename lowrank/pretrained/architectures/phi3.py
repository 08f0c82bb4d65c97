"""Phi-3 and Phi-4: Llama with one kernel for queries, keys and values, one for gate and up, and LongRoPE."""

import math
from typing import Any

from lowrank.core.errors import UserError, plural
from lowrank.models import DecoderConfig
from lowrank.pretrained import family, hf_configs, hf_export
from lowrank.pretrained.hf_configs import HF

LONGROPE = ("longrope", "su", "yarn")  # the names that Phi-3's configs have had for it


def config(hf: HF) -> DecoderConfig:
    """Phi-3's `config.json` as our config."""
    params = {"partial_rotary_factor": hf.get("partial_rotary_factor"), **hf_configs.rope_parameters(hf)}
    share = params.pop("partial_rotary_factor") or 1.0
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // hf.get("num_attention_heads", 1)
    rotary = int(head_dim * share)
    if (params.get("rope_type") or params.get("type")) in LONGROPE:
        params |= _longrope(hf, params, rotary)
    fields = hf_configs.llama_like(
        {**hf, "rope_parameters": params, "rope_scaling": None},
        {"rms_norm_eps": 1e-5},
        fused_qkv=True,
        fused_gate_up=True,
        rotary_dim=rotary if rotary != head_dim else 0,
    )
    return DecoderConfig(**fields, **hf_configs.read_windows(hf.get("sliding_window"), ["sliding_attention"]))


def _longrope(hf: HF, params: HF, rotary: int) -> dict[str, Any]:
    """The rope parameters with the values that transformers derives from the config's other fields."""
    for name in ("short_factor", "long_factor"):
        factors = params.get(name)
        if not isinstance(factors, list) or len(factors) != rotary // 2:
            has = plural(len(factors), "number") if isinstance(factors, list) else repr(factors)
            raise UserError(f"config.json's {name} of LongRoPE is {has}, and rope has {rotary // 2} frequencies")
    original = params.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or 4096
    factor = params.get("factor") or hf.get("max_position_embeddings", original) / original
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": params.get("attention_factor") or default,
    }


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """Our config as Phi-3's `config.json`."""
    fields = hf_export.llama_like(c, "phi3", "Phi3") | {"sliding_window": c.window or None}
    fields["partial_rotary_factor"] = (c.rotary_dim or c.head_dim) / c.head_dim
    original = c.rope_scaling.original_positions if c.rope_scaling else c.max_positions
    return fields | {"original_max_position_embeddings": original}


FAMILY = family.llama_like(config, hf_config)
