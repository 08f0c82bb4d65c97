"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): a pre-norm encoder with rope, windows and a gated MLP."""

import dataclasses
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.models import EncoderConfig
from lowrank.pretrained import hf_configs, hf_export
from lowrank.pretrained.family import Family
from lowrank.pretrained.hf_configs import HF
from lowrank.pretrained.hf_rope import read_rope
from lowrank.pretrained.hf_tensors import Tensor, linear_rows, norm_rows, stacked, whole

FIELDS = {k: v for k, v in hf_configs.LLAMA.items() if k != "norm_eps"}
DEFAULTS = {"norm_eps": 1e-5, "local_attention": 128, "global_attn_every_n_layers": 3, "classifier_pooling": "cls"}
THETAS = {"full_attention": ("global_rope_theta", 160000.0), "sliding_attention": ("local_rope_theta", 10000.0)}


def config(hf: HF) -> EncoderConfig:
    """ModernBERT's `config.json` as our config."""
    hf = {**DEFAULTS, **hf}
    fields = hf_configs.rename_fields(hf, FIELDS)
    every = hf["global_attn_every_n_layers"]
    kinds = ["sliding_attention" if i % every else "full_attention" for i in range(fields["layers"])]
    if hf["classifier_pooling"] not in ("cls", "mean"):
        raise unknown("classifier_pooling in config.json,", hf["classifier_pooling"], ("cls", "mean"))
    far, near = (_theta(hf, kind) for kind in THETAS)
    return EncoderConfig(
        **fields,
        **hf_configs.read_windows(hf["local_attention"] // 2 + 1, hf.get("layer_types") or kinds),
        learned_positions=False,
        rope_theta=far,
        local_rope_theta=near,
        types=0,
        norm_eps=hf["norm_eps"],
        norm_bias=bool(hf.get("norm_bias")),
        pre_norm=True,
        first_norm=False,
        fused_qkv=True,
        attn_bias=bool(hf.get("attention_bias")),
        mlp_bias=bool(hf.get("mlp_bias")),
        gated=True,
        fused_gate_up=True,
        activation=hf_configs.read_activation(hf, "hidden_activation", "gelu"),
        pooling=hf["classifier_pooling"],
        dense_head=True,
        head_activation=hf_configs.read_activation(hf, "classifier_activation", "gelu"),
        head_bias=bool(hf.get("classifier_bias")),
        head_norm=True,
    )


def _theta(hf: HF, kind: str) -> float:
    old, default = THETAS[kind]
    params = (hf.get("rope_parameters") or {}).get(kind) or {}
    theta, scaling = read_rope({**params, **(hf.get("rope_scaling") or {})}, hf.get(old) or default, hf)
    if scaling is not None:
        raise UserError(f"config.json's rope scaling {scaling.kind!r} is not supported in ModernBERT")
    return theta


def tensors(c: EncoderConfig) -> list[Tensor]:
    """The leaves of ModernBERT; its first layer has no norm before attention."""
    rows = linear_rows("attn/qkv", "attn.Wqkv", c.attn_bias) + linear_rows("attn/o", "attn.Wo", c.attn_bias)
    rows += linear_rows("mlp/gate_up", "mlp.Wi", c.mlp_bias) + linear_rows("mlp/down", "mlp.Wo", c.mlp_bias)
    rows += norm_rows("attn_norm", "attn_norm", c.norm_bias) + norm_rows("mlp_norm", "mlp_norm", c.norm_bias)
    ends = [("embed/embedding", "model.embeddings.tok_embeddings.weight", False)]
    ends += norm_rows("embed/norm", "model.embeddings.norm", c.norm_bias)
    ends += norm_rows("norm", "model.final_norm", c.norm_bias)
    if c.num_labels:
        ends += linear_rows("head/dense", "head.dense", c.head_bias) + norm_rows("head/norm", "head.norm", c.norm_bias)
        ends += linear_rows("head/out", "classifier", True)
    layers = [
        dataclasses.replace(t, absent=(0,)) if "/attn_norm/" in t.leaf else t for t in stacked(c, "model.layers", rows)
    ]
    return [*whole(ends), *layers]


def hf_config(c: EncoderConfig) -> dict[str, Any]:
    """Our config as ModernBERT's `config.json`."""
    fields = hf_export.hf_fields(c, "modernbert", FIELDS, "ModernBertModel", "ModernBertForSequenceClassification")
    return fields | {
        "norm_eps": c.norm_eps,
        "norm_bias": c.norm_bias,
        "attention_bias": c.attn_bias,
        "mlp_bias": c.mlp_bias,
        "hidden_activation": hf_export.ACTIVATIONS[c.activation],
        "layer_types": hf_export.layer_types(c),
        "local_attention": 2 * (c.window - 1),
        "global_rope_theta": c.rope_theta,
        "local_rope_theta": c.local_rope_theta,
        "classifier_pooling": c.pooling,
        "classifier_activation": hf_export.ACTIVATIONS[c.head_activation],
        "classifier_bias": c.head_bias,
    }


FAMILY = Family(config, tensors, hf_config, "model.", (r"head\..*", r"decoder\..*"))
