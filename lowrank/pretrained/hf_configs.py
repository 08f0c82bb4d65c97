"""A Hugging Face `config.json` as our config, family by family.

Each family is a table of the fields that only change their names, and a function for the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.models import DecoderConfig, EncoderConfig
from lowrank.pretrained.hf_rope import read_rope, rope_parameters

HF = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

LLAMA = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
GPT2 = {
    "vocab_size": "vocab_size",
    "max_positions": "n_positions",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "norm_eps": "layer_norm_epsilon",
}
BERT = {**LLAMA, "norm_eps": "layer_norm_eps", "types": "type_vocab_size"}


def rename_fields(hf: HF, fields: dict[str, str]) -> dict[str, Any]:
    """The values of `{our name: their name}` by our names. Raises UserError for one that is missing."""
    for name in fields.values():
        if hf.get(name) is None:
            raise UserError(f"config.json has no {name!r}, which its model_type needs")
    return {ours: hf[theirs] for ours, theirs in fields.items()}


def read_activation(hf: HF, key: str, default: str) -> str:
    """Our name of an activation. Raises UserError for an unknown one."""
    name = hf.get(key) or default
    if name not in ACTIVATIONS:
        raise unknown(f"activation in config.json's {key!r},", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def refuse_options(hf: HF, **unsupported: Any) -> None:
    """Raises UserError for options whose values change the model in a way that is not supported."""
    for key, fine in unsupported.items():
        if hf.get(key, fine) not in (fine, None):
            raise UserError(f"config.json's {key}={hf[key]!r} is not supported (only {fine!r})")


def read_windows(window: int | None, kinds: Sequence[str]) -> dict[str, Any]:
    """The config's sliding window, and its local layers if not all layers are local."""
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if not window or not any(local):
        return {}
    return {"window": int(window)} | ({} if all(local) else {"local_layers": local})


def llama_like(hf: HF, defaults: HF, **fixed: Any) -> dict[str, Any]:
    """The fields of a config with Llama's names; `defaults` are its family's, `fixed` our own fields."""
    hf = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **defaults, **hf}
    fields = rename_fields(hf, LLAMA)
    theta, scaling = read_rope(rope_parameters(hf), 10000.0, hf)
    fields |= {
        "kv_heads": hf.get("num_key_value_heads") or fields["heads"],
        "head_dim": hf.get("head_dim") or fields["width"] // fields["heads"],
        "tied": bool(hf["tie_word_embeddings"]),
        "activation": read_activation(hf, "hidden_act", "silu"),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    return fields | fixed


def llama(hf: HF) -> DecoderConfig:
    """Llama 2, 3.x and SmolLM2."""
    bias = bool(hf.get("attention_bias"))
    return DecoderConfig(**llama_like(hf, {}, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias"))))


def mistral(hf: HF) -> DecoderConfig:
    """Mistral: Llama with a sliding window in every layer."""
    refuse_options(hf, layer_types=None)
    windows = read_windows(hf.get("sliding_window", 4096), ["sliding_attention"])
    return DecoderConfig(**llama_like(hf, {"num_key_value_heads": 8}, **windows))


def _qwen(hf: HF, defaults: HF, **fixed: Any) -> DecoderConfig:
    first = hf.get("max_window_layers", 28)
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(hf.get("num_hidden_layers", 0))]
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return DecoderConfig(**llama_like(hf, defaults, **fixed, **read_windows(window, hf.get("layer_types") or kinds)))


def qwen2(hf: HF) -> DecoderConfig:
    """Qwen2 and 2.5: Llama with biases on q, k and v."""
    return _qwen(hf, {}, qkv_bias=True)


def qwen3(hf: HF) -> DecoderConfig:
    """Qwen3: Llama with norms on q and k."""
    bias = bool(hf.get("attention_bias"))
    return _qwen(hf, {"head_dim": 128}, qk_norm=True, qkv_bias=bias, o_bias=bias)


def mixtral(hf: HF) -> DecoderConfig:
    """Mixtral: Mistral with a mixture of experts."""
    hf = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2, **hf}
    hf |= {"rope_parameters": {"rope_theta": 1e6, **rope_parameters(hf)}, "rope_scaling": None}
    windows = read_windows(hf.get("sliding_window"), ["sliding_attention"])
    experts = {"experts": hf["num_local_experts"], "experts_per_token": hf["num_experts_per_tok"]}
    return DecoderConfig(**llama_like(hf, {}, normalize_gates=True, **experts, **windows))


def _experts(hf: HF, experts: int, per_token: int) -> dict[str, Any]:
    """The experts of OLMoE and the Qwen MoE models; `experts` and `per_token` are the defaults of the family."""
    return {
        "experts": hf.get("num_experts") or hf.get("num_local_experts") or experts,
        "experts_per_token": hf.get("num_experts_per_tok", per_token),
        "expert_hidden": hf.get("moe_intermediate_size", 0),
        "normalize_gates": bool(hf.get("norm_topk_prob")),
        "shared_hidden": hf.get("shared_expert_intermediate_size", 0),
    }


def olmoe(hf: HF) -> DecoderConfig:
    """OLMoE: one norm over all heads of q and k, clipping of q, k and v, and a mixture of experts."""
    bias, clip = bool(hf.get("attention_bias")), float(hf.get("clip_qkv") or 0)
    fixed = {"wide_qk_norm": True, "clip_qkv": clip, "qkv_bias": bias, "o_bias": bias, **_experts(hf, 64, 8)}
    return DecoderConfig(**llama_like(hf, {"rms_norm_eps": 1e-5}, **fixed))


def _every_layer_sparse(hf: HF) -> None:
    """Raises UserError for models with a dense MLP in some layers."""
    refuse_options(hf, decoder_sparse_step=1)
    if hf.get("mlp_only_layers"):
        raise UserError(f"config.json's mlp_only_layers={hf['mlp_only_layers']!r} is not supported (only [])")


def qwen2_moe(hf: HF) -> DecoderConfig:
    """Qwen1.5 and Qwen2 MoE: Qwen2 with a mixture of experts, and an expert that every token uses."""
    _every_layer_sparse(hf)
    hf = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, **hf}
    layers = range(hf.get("num_hidden_layers", 0)) if hf.get("use_sliding_window") else ()
    first = hf.get("max_window_layers", 28)
    kinds = ["full_attention" if i % 2 or i >= first else "sliding_attention" for i in layers]
    windows = read_windows(hf.get("sliding_window", 4096), hf.get("layer_types") or kinds)
    return DecoderConfig(**llama_like(hf, {}, qkv_bias=hf.get("qkv_bias", True), **_experts(hf, 60, 4), **windows))


def qwen3_moe(hf: HF) -> DecoderConfig:
    """Qwen3 MoE: Qwen3 with a mixture of experts."""
    _every_layer_sparse(hf)
    hf = {"moe_intermediate_size": 768, "num_key_value_heads": 4, **hf}
    bias = bool(hf.get("attention_bias"))
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    fixed = {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, **_experts(hf, 128, 8)}
    return DecoderConfig(**llama_like(hf, {}, **fixed, **read_windows(window, ["sliding_attention"])))


def _gemma(hf: HF, pattern: int, caps: tuple[float, float], **fixed: Any) -> DecoderConfig:
    """`caps` are the default soft caps of attention and logits."""
    refuse_options(hf, use_bidirectional_attention=False)
    layers, bias = hf.get("num_hidden_layers", 0), bool(hf.get("attention_bias"))
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    fixed |= read_windows(hf.get("sliding_window", 4096), hf.get("layer_types") or kinds)
    fields = llama_like(
        hf,
        {"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True},
        norm_offset=1.0,
        post_norms=True,
        qkv_bias=bias,
        o_bias=bias,
        embed_scale=float(hf.get("hidden_size", 0)) ** 0.5,
        attn_scale=float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
        attn_logit_softcap=float(hf.get("attn_logit_softcapping", caps[0]) or 0),
        final_logit_softcap=float(hf.get("final_logit_softcapping", caps[1]) or 0),
    )
    return DecoderConfig(
        **{**fields, "activation": read_activation(hf, "hidden_activation", "gelu_pytorch_tanh"), **fixed}
    )


def gemma2(hf: HF) -> DecoderConfig:
    """Gemma 2: alternating local and global layers, and soft caps."""
    return _gemma(hf, 2, (50.0, 30.0))


def gemma3(hf: HF) -> DecoderConfig:
    """Gemma 3 text: five local layers per global one, each kind with its own rope, and norms on q and k."""
    nested, old = hf.get("rope_parameters") or {}, rope_parameters({**hf, "rope_parameters": None})
    far = {**old, **(nested.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    # Parameters of a kind of layer have an original context of their own, not that of the top level.
    theta, scaling = read_rope(far, 1e6, {**hf, "original_max_position_embeddings": None})
    local = {"rope_theta": hf.get("rope_local_base_freq"), **(nested.get("sliding_attention") or {})}
    local_theta, local_scaling = read_rope(local, 10000.0, hf)
    if local_scaling is not None:
        raise UserError(f"config.json's rope scaling of local layers ({local_scaling.kind!r}) is not supported")
    ropes = {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}
    hf = {k: v for k, v in hf.items() if k not in ("rope_parameters", "rope_scaling")}
    return _gemma(hf, hf.get("sliding_window_pattern", 6), (0.0, 0.0), qk_norm=True, **ropes)


def gpt2(hf: HF) -> DecoderConfig:
    """GPT-2."""
    refuse_options(hf, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    fields = rename_fields({"layer_norm_epsilon": 1e-5, **hf}, GPT2)
    return DecoderConfig(
        **fields,
        kv_heads=fields["heads"],
        head_dim=fields["width"] // fields["heads"],
        hidden=hf.get("n_inner") or 4 * fields["width"],
        tied=hf.get("tie_word_embeddings", True),
        activation=read_activation(hf, "activation_function", "gelu_new"),
        norm="layer",
        fused_qkv=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gated=False,
        learned_positions=True,
    )


def _encoder(hf: HF, offset: int, **fixed: Any) -> EncoderConfig:
    refuse_options(hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    fields = rename_fields({"layer_norm_eps": 1e-12, "type_vocab_size": 2, **hf}, BERT)
    return EncoderConfig(
        **{**fields, "max_positions": fields["max_positions"] - offset},
        position_offset=offset,
        activation=read_activation(hf, "hidden_act", "gelu"),
        **fixed,
    )


def bert(hf: HF) -> EncoderConfig:
    """BERT, and the sentence encoders derived from it."""
    return _encoder(hf, 0, pooling="pooler")


def roberta(hf: HF) -> EncoderConfig:
    """RoBERTa: the rows of its position table up to the padding id are never read."""
    return _encoder(hf, hf.get("pad_token_id", 1) + 1, pooling="cls", dense_head=True)
