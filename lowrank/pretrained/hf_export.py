"""Our config as a Hugging Face `config.json`, family by family: the inverse of `hf_configs`."""

from collections.abc import Callable
from typing import Any

from lowrank.models import DecoderConfig, EncoderConfig
from lowrank.pretrained.hf_configs import BERT, GPT2, LLAMA
from lowrank.pretrained.hf_rope import rope_fields

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "tanh": "tanh"}


def _labels(n: int) -> dict[str, Any]:
    names = [f"LABEL_{i}" for i in range(n)]
    labels = {"id2label": {str(i): x for i, x in enumerate(names)}, "label2id": {x: i for i, x in enumerate(names)}}
    return labels if n else {}


def hf_fields(c: Any, model_type: str, fields: dict[str, str], lm: str, classifier: str) -> dict[str, Any]:
    """The model type, the architecture `lm` or `classifier`, the labels and `{our name: their name}` by their names."""
    architecture = classifier if c.num_labels else lm
    renamed = {theirs: getattr(c, ours) for ours, theirs in fields.items()}
    return {"model_type": model_type, "architectures": [architecture], **renamed, **_labels(c.num_labels)}


def llama_like(c: DecoderConfig, model_type: str, name: str) -> dict[str, Any]:
    """The fields of a `config.json` with Llama's names; `name` is the start of transformers' classes."""
    return {
        **hf_fields(c, model_type, LLAMA, f"{name}ForCausalLM", f"{name}ForSequenceClassification"),
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "tie_word_embeddings": c.tied,
        "hidden_act": ACTIVATIONS[c.activation],
        **rope_fields(c.rope_theta, c.rope_scaling),
    }


def layer_types(c: DecoderConfig | EncoderConfig) -> list[str]:
    """The kind of attention of each layer."""
    local = c.local_layers or (c.window > 0,) * c.layers
    return ["sliding_attention" if x else "full_attention" for x in local]


def _llama(c: DecoderConfig) -> dict[str, Any]:
    return llama_like(c, "llama", "Llama") | {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _mistral(c: DecoderConfig) -> dict[str, Any]:
    return llama_like(c, "mistral", "Mistral") | {"sliding_window": c.window or None}


def _qwen(c: DecoderConfig, model_type: str, name: str) -> dict[str, Any]:
    window = {"use_sliding_window": c.window > 0, "sliding_window": c.window or None, "layer_types": layer_types(c)}
    return llama_like(c, model_type, name) | window


def _mixtral(c: DecoderConfig) -> dict[str, Any]:
    experts = {"num_local_experts": c.experts, "num_experts_per_tok": c.experts_per_token}
    return llama_like(c, "mixtral", "Mixtral") | {"sliding_window": c.window or None, **experts}


def _sparse(c: DecoderConfig, model_type: str, name: str) -> dict[str, Any]:
    experts = {"num_experts": c.experts, "num_experts_per_tok": c.experts_per_token}
    return llama_like(c, model_type, name) | experts | {"norm_topk_prob": c.normalize_gates}


def _olmoe(c: DecoderConfig) -> dict[str, Any]:
    return _sparse(c, "olmoe", "Olmoe") | {"attention_bias": c.qkv_bias, "clip_qkv": c.clip_qkv or None}


def _qwen2_moe(c: DecoderConfig) -> dict[str, Any]:
    widths = {"moe_intermediate_size": c.expert_hidden, "shared_expert_intermediate_size": c.shared_hidden}
    window = {"use_sliding_window": c.window > 0, "sliding_window": c.window or None, "layer_types": layer_types(c)}
    return _sparse(c, "qwen2_moe", "Qwen2Moe") | widths | window | {"qkv_bias": c.qkv_bias}


def _qwen3_moe(c: DecoderConfig) -> dict[str, Any]:
    more = {"moe_intermediate_size": c.expert_hidden, "attention_bias": c.qkv_bias}
    window = {"use_sliding_window": c.window > 0, "sliding_window": c.window or None}
    return _sparse(c, "qwen3_moe", "Qwen3Moe") | more | window


def _gemma(c: DecoderConfig, model_type: str, name: str) -> dict[str, Any]:
    return llama_like(c, model_type, name) | {
        "hidden_activation": ACTIVATIONS[c.activation],
        "attention_bias": c.qkv_bias,
        "sliding_window": c.window or None,
        "layer_types": layer_types(c),
        "query_pre_attn_scalar": round((c.attn_scale or c.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": c.attn_logit_softcap or None,
        "final_logit_softcapping": c.final_logit_softcap or None,
    }


LLAMA_LIKE: dict[str, Callable[[DecoderConfig], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "qwen2": lambda c: _qwen(c, "qwen2", "Qwen2"),
    "qwen3": lambda c: _qwen(c, "qwen3", "Qwen3") | {"attention_bias": c.qkv_bias},
    "gemma2": lambda c: _gemma(c, "gemma2", "Gemma2"),
    "gemma3_text": lambda c: _gemma(c, "gemma3_text", "Gemma3") | {"rope_local_base_freq": c.local_rope_theta},
}


def gpt2(c: DecoderConfig) -> dict[str, Any]:
    """GPT-2's `config.json`."""
    fields = hf_fields(c, "gpt2", GPT2, "GPT2LMHeadModel", "GPT2ForSequenceClassification")
    return fields | {"n_inner": c.hidden, "activation_function": "gelu_new", "tie_word_embeddings": c.tied}


def _encoder(c: EncoderConfig, model_type: str, name: str) -> dict[str, Any]:
    fields = hf_fields(c, model_type, BERT, f"{name}Model", f"{name}ForSequenceClassification")
    return fields | {
        "max_position_embeddings": c.max_positions + c.position_offset,
        "hidden_act": ACTIVATIONS[c.activation],
    }


def bert(c: EncoderConfig) -> dict[str, Any]:
    """BERT's `config.json`."""
    return _encoder(c, "bert", "Bert") | {"pad_token_id": 0}


def roberta(c: EncoderConfig) -> dict[str, Any]:
    """RoBERTa's `config.json`; its padding id gives the start of the position table."""
    return _encoder(c, "roberta", "Roberta") | {"pad_token_id": c.position_offset - 1}
