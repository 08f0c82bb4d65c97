"""GPT-NeoX and Pythia: attention and MLP in parallel, rope on a part of each head, and LayerNorms."""

from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import hf_configs, hf_export
from lowrank.pretrained.family import ROPE_TABLES, Family
from lowrank.pretrained.hf_configs import HF
from lowrank.pretrained.hf_rope import rope_parameters
from lowrank.pretrained.hf_tensors import Tensor, decoder_head, linear_rows, norm_rows, stacked, whole


def config(hf: HF) -> DecoderConfig:
    """GPT-NeoX's `config.json` as our config."""
    theta, share = hf.get("rotary_emb_base", 10000.0), hf.get("rotary_pct", 0.25)
    params = {"rope_theta": theta, "partial_rotary_factor": share, **rope_parameters(hf)}
    head_dim = hf.get("hidden_size", 0) // hf.get("num_attention_heads", 1)
    rotary = int(head_dim * params.pop("partial_rotary_factor"))
    bias = bool(hf.get("attention_bias", True))
    fields = hf_configs.llama_like(
        {"hidden_act": "gelu", **hf, "rope_parameters": params, "rope_scaling": None},
        {"rms_norm_eps": hf.get("layer_norm_eps", 1e-5)},
        norm="layer",
        parallel_residual=bool(hf.get("use_parallel_residual", True)),
        fused_qkv=True,
        qkv_by_head=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        gated=False,
        rotary_dim=rotary if rotary != head_dim else 0,
    )
    return DecoderConfig(**{**fields, "kv_heads": fields["heads"], "head_dim": head_dim})


def tensors(c: DecoderConfig) -> list[Tensor]:
    """The leaves of GPT-NeoX."""
    rows = linear_rows("attn/qkv", "attention.query_key_value", c.qkv_bias)
    rows += linear_rows("attn/o", "attention.dense", c.o_bias)
    rows += linear_rows("mlp/up", "mlp.dense_h_to_4h", True) + linear_rows("mlp/down", "mlp.dense_4h_to_h", True)
    rows += norm_rows("attn_norm", "input_layernorm", True) + norm_rows("mlp_norm", "post_attention_layernorm", True)
    ends = [("embed/embedding", "gpt_neox.embed_in.weight", False)]
    ends += norm_rows("norm", "gpt_neox.final_layer_norm", True) + decoder_head(c)
    return [*whole(ends), *stacked(c, "gpt_neox.layers", rows)]


def hf_config(c: DecoderConfig) -> dict[str, Any]:
    """Our config as GPT-NeoX's `config.json`."""
    fields = hf_export.llama_like(c, "gpt_neox", "GPTNeoX")
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps"):
        del fields[name]
    return fields | {
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.parallel_residual,
        "attention_bias": c.qkv_bias,
        "rotary_pct": (c.rotary_dim or c.head_dim) / c.head_dim,
        "rotary_emb_base": fields.pop("rope_theta"),
    }


IGNORED = (ROPE_TABLES, r".*attention\.(masked_)?bias", r"lm_head\.weight")
RENAMED = {"embed_out.weight": "lm_head.weight"}  # the head's name before transformers 5
FAMILY = Family(config, tensors, hf_config, "gpt_neox.", IGNORED, RENAMED)
