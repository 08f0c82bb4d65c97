"""Gemma 1: Llama with a scaled embedding, stored norms of `scale - 1`, and the tanh form of GELU."""

from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import family, hf_configs, hf_export
from lowrank.pretrained.hf_configs import HF

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}


def config(hf: HF) -> DecoderConfig:
    """Gemma's `config.json` as our config; the `gelu` of its first releases stands for the tanh form."""
    hf_configs.refuse_options(hf, use_bidirectional_attention=False)
    name = hf.get("hidden_activation") or hf.get("hidden_act")
    hf = {**hf, "hidden_act": "gelu_pytorch_tanh" if name in (None, "gelu") else name}
    bias, scale = bool(hf.get("attention_bias")), float(hf.get("hidden_size", 0)) ** 0.5
    return DecoderConfig(
        **hf_configs.llama_like(hf, DEFAULTS, norm_offset=1.0, embed_scale=scale, qkv_bias=bias, o_bias=bias)
    )


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """Our config as Gemma's `config.json`."""
    activation = {"hidden_activation": hf_export.ACTIVATIONS[c.activation]}
    return hf_export.llama_like(c, "gemma", "Gemma") | activation | {"attention_bias": c.qkv_bias}


FAMILY = family.llama_like(config, hf_config)
