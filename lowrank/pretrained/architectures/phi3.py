"""Phi-3 and Phi-4: Llama with one kernel for queries, keys and values, one for gate and up, and LongRoPE."""

from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import family, hf_configs, hf_export
from lowrank.pretrained.hf_configs import HF
from lowrank.pretrained.hf_rope import rope_parameters

LONGROPE = ("longrope", "su", "yarn")  # the names that Phi-3's configs have had for it


def config(hf: HF) -> DecoderConfig:
    """Phi-3's `config.json` as our config."""
    params = {"partial_rotary_factor": hf.get("partial_rotary_factor"), **rope_parameters(hf)}
    share = params.pop("partial_rotary_factor") or 1.0
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // hf.get("num_attention_heads", 1)
    rotary = int(head_dim * share)
    if (params.get("rope_type") or params.get("type")) in LONGROPE:
        params |= {"rope_type": "longrope"}
        hf = {**hf, "original_max_position_embeddings": hf.get("original_max_position_embeddings") or 4096}
    fields = hf_configs.llama_like(
        {**hf, "rope_parameters": params, "rope_scaling": None},
        {"rms_norm_eps": 1e-5},
        fused_qkv=True,
        fused_gate_up=True,
        rotary_dim=rotary if rotary != head_dim else 0,
    )
    return DecoderConfig(**fields, **hf_configs.read_windows(hf.get("sliding_window"), ["sliding_attention"]))


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """Our config as Phi-3's `config.json`."""
    fields = hf_export.llama_like(c, "phi3", "Phi3") | {"sliding_window": c.window or None}
    fields["partial_rotary_factor"] = (c.rotary_dim or c.head_dim) / c.head_dim
    original = c.rope_scaling.original_positions if c.rope_scaling else c.max_positions
    return fields | {"original_max_position_embeddings": original}


FAMILY = family.llama_like(config, hf_config)
