"""OLMo-2: Llama with norms on the outputs of attention and MLP alone, and one norm over all heads of q and of k."""

from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import family, hf_configs, hf_export
from lowrank.pretrained.hf_configs import HF


def config(hf: HF) -> DecoderConfig:
    """OLMo-2's `config.json` as our config."""
    bias = bool(hf.get("attention_bias"))
    norms = {"pre_norms": False, "post_norms": True, "wide_qk_norm": True}
    return DecoderConfig(**hf_configs.llama_like(hf, {"rms_norm_eps": 1e-5}, qkv_bias=bias, o_bias=bias, **norms))


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """Our config as OLMo-2's `config.json`."""
    return hf_export.llama_like(c, "olmo2", "Olmo2") | {"attention_bias": c.qkv_bias}


FAMILY = family.llama_like(config, hf_config)
