"""SmolLM3: Llama in which some layers have no rope (Yang et al. 2025, arXiv:2501.18795)."""

from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import family, hf_configs, hf_export
from lowrank.pretrained.hf_configs import HF

DEFAULTS = {"rope_theta": 2e6, "num_key_value_heads": 4, "tie_word_embeddings": True}


def config(hf: HF) -> DecoderConfig:
    """SmolLM3's `config.json` as our config; its `no_rope_layers` are 1 in the layers with rope."""
    layers, interval = hf.get("num_hidden_layers", 0), hf.get("no_rope_layer_interval", 4)
    given = hf.get("no_rope_layers")
    rope = tuple(bool(x) for x in given) if given else tuple((i + 1) % interval != 0 for i in range(layers))
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types") or ["full_attention" if x else "sliding_attention" for x in rope]
    bias = bool(hf.get("attention_bias"))
    fields = hf_configs.llama_like(
        {**DEFAULTS, **hf},
        {},
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias")),
        rope_layers=() if all(rope) else rope[:layers],
    )
    return DecoderConfig(**fields, **hf_configs.read_windows(window, kinds))


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """Our config as SmolLM3's `config.json`."""
    return hf_export.llama_like(c, "smollm3", "SmolLM3") | {
        "no_rope_layers": [int(x) for x in c.rope_layers or (True,) * c.layers],
        "use_sliding_window": c.window > 0,
        "sliding_window": c.window or None,
        "layer_types": hf_export.layer_types(c),
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
    }


FAMILY = family.llama_like(config, hf_config)
