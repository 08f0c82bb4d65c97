"""Granite 3: Llama with factors for the embedding, the attention scores, the residual branches and the logits."""

from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import family, hf_configs, hf_export
from lowrank.pretrained.hf_configs import HF

FACTORS = {
    "embed_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attn_scale": "attention_multiplier",
    "logit_divisor": "logits_scaling",
}


def config(hf: HF) -> DecoderConfig:
    """Granite's `config.json` as our config."""
    bias = bool(hf.get("attention_bias"))
    factors = {ours: float(hf.get(theirs, 1.0)) for ours, theirs in FACTORS.items()}
    biases = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(hf.get("mlp_bias"))}
    return DecoderConfig(**hf_configs.llama_like(hf, {}, **biases, **factors))


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """Our config as Granite's `config.json`."""
    factors = {theirs: getattr(c, ours) for ours, theirs in FACTORS.items()}
    biases = {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}
    return hf_export.llama_like(c, "granite", "Granite") | biases | factors


FAMILY = family.llama_like(config, hf_config)
