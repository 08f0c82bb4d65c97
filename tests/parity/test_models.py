"""Every family's logits agree with transformers on a tiny random model, plain and padded on either side."""

import copy
import tempfile

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from lowrank.models import build_model
from lowrank.pretrained.families import FAMILIES, family_of
from tests.support.close import assert_close

B, T, VOCAB = 3, 24, 83
REAL = (T, 17, 9)  # tokens of each row that are not padding
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PAD = {"pad_token_id": 0}
LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 6.0, 9.0]}
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
GEMMA = {**GROUPED, "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
ENCODER = {**SMALL, "type_vocab_size": 2, "pad_token_id": 0}

DECODERS = {
    "llama-2": {"model_type": "llama", **SMALL},
    "llama-3-scaled": {"model_type": "llama", **GROUPED, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama-linear": {"model_type": "llama", **GROUPED, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-biased": {"model_type": "llama", **GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "smollm2": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True, "rope_theta": 100000.0},
    "mistral": {"model_type": "mistral", **GROUPED, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **GROUPED, "rope_theta": 1e6},
    "qwen2.5-tied-windowed": {
        "model_type": "qwen2",
        **GROUPED,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **GROUPED, "head_dim": 16},
    "qwen3-yarn": {"model_type": "qwen3", **GROUPED, "head_dim": 16, "rope_scaling": YARN},
    "gemma-2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    "gemma-3": {
        "model_type": "gemma3_text",
        **GEMMA,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 5.0,
    },
    "mixtral": {
        "model_type": "mixtral",
        **GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
    },
    "olmoe": {"model_type": "olmoe", **GROUPED, "num_experts": 5, "num_experts_per_tok": 3},
    "olmoe-normalized": {
        "model_type": "olmoe",
        **GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
        "clip_qkv": 0.5,
    },
    "qwen2-moe": {"model_type": "qwen2_moe", **GROUPED, **EXPERTS, "shared_expert_intermediate_size": 20},
    "qwen3-moe": {"model_type": "qwen3_moe", **GROUPED, **EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "gpt-2": {"model_type": "gpt2", **GPT2},
    "olmo-2": {"model_type": "olmo2", **GROUPED},
    "granite": {
        "model_type": "granite",
        **GROUPED,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
        "logits_scaling": 3.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3": {"model_type": "smollm3", **GROUPED, **PAD, "no_rope_layers": [1, 0, 1]},
    "smollm3-windowed": {
        "model_type": "smollm3",
        **GROUPED,
        **PAD,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "gemma": {"model_type": "gemma", **GROUPED, "head_dim": 16},
    "gpt-neox": {"model_type": "gpt_neox", **SMALL, "rotary_pct": 0.5, "rotary_emb_base": 500.0},
    "gpt-neox-sequential": {"model_type": "gpt_neox", **SMALL, "use_parallel_residual": False, "attention_bias": False},
    "phi-3": {"model_type": "phi3", **GROUPED, **PAD, "sliding_window": 7},
    "phi-3-longrope": {"model_type": "phi3", **GROUPED, **PAD, **LONGROPE, "original_max_position_embeddings": 8},
    "phi-4-mini": {
        "model_type": "phi3",
        **GROUPED,
        **PAD,
        **LONGROPE,
        "hidden_size": 64,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "tie_word_embeddings": True,
    },
}
DYNAMIC = {"model_type": "llama", **GROUPED, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
DYNAMIC |= {"max_position_embeddings": 16}
ENCODERS = {
    "bert": {"model_type": "bert", **ENCODER},
    "roberta": {"model_type": "roberta", **ENCODER, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "model_type": "distilbert",
        **{
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
        },
    },
    "modernbert": {"model_type": "modernbert", **SMALL, **PAD, "num_hidden_layers": 4, "local_attention": 6},
}
DEBERTA = {"relative_attention": True, "position_biased_input": False, "share_att_key": True, "position_buckets": 6}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
ENCODERS["deberta-v2"] = {"model_type": "deberta-v2", **ENCODER, "type_vocab_size": 0, **DEBERTA}
POOLED = ("bert", "roberta")


def reference(auto, spec, **options):
    """A transformers model of random weights, norms and biases included, that stand far from their initial values."""
    spec = copy.deepcopy({**spec, **options})  # transformers changes the rope parameters that it is given
    config = transformers.AutoConfig.for_model(spec.pop("model_type"), **spec)
    model = auto.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise * 1.5 * p.shape[-1] ** -0.5 if p.ndim == 2 else p + 0.3 * noise)
    return model


def on_disk(model):
    """The tensors as `save_pretrained` writes them: one for each expert, where memory has them fused."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def converted(model, config, family):
    """Our parameter tree of a transformers model, by the family's table; every tensor is accounted for."""
    state = (
        on_disk(model) if getattr(config, "experts", 0) else {name: p.numpy() for name, p in model.named_parameters()}
    )
    params, used = {}, set()
    for tensor in family.tensors(config):
        arrays = [state[name] for name in tensor.names]
        arrays = [np.ones_like(arrays[0])] * len(tensor.absent) + [a.T if tensor.transpose else a for a in arrays]
        *path, last = tensor.leaf.split("/")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = np.reshape(arrays, tensor.stack + arrays[0].shape)
        used |= set(tensor.names)
    assert used == set(state)
    like = jax.eval_shape(build_model(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, like)
    return params


def batch(side):
    """`(tokens, segments)`; `side` is where the padding is, or None."""
    tokens = np.random.default_rng(0).integers(5, VOCAB, (B, T)).astype(np.int32)
    if side is None:
        return tokens, None
    real = np.arange(T)[None] < np.array(REAL)[:, None]
    segments = (real if side == "right" else real[:, ::-1]).astype(np.int32)
    return tokens, segments


def as_torch(tokens, segments):
    inputs = {"input_ids": torch.tensor(tokens, dtype=torch.long)}
    if segments is not None:
        mask = torch.tensor(segments, dtype=torch.long)
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return inputs


def assert_same(ours, theirs, where=None, *, name):
    at = ... if where is None else where > 0
    assert_close(np.asarray(ours)[at], theirs.numpy()[at], relative=5e-5, name=name)


@pytest.fixture(params=DECODERS)
def decoder(request):
    spec = DECODERS[request.param]
    family = family_of(spec)
    model = reference(transformers.AutoModelForCausalLM, spec)
    config = family.config(model.config.to_dict())
    return model, config, converted(model, config, family)


def test_every_decoder_family_computes_the_logits_of_transformers(decoder):
    model, config, params = decoder
    apply = jax.jit(lambda tokens, segments: build_model(config).apply({"params": params}, tokens, segments=segments))
    for side in (None, "right", "left"):
        tokens, segments = batch(side)
        theirs = model(**as_torch(tokens, segments)).logits
        assert_same(apply(tokens, segments), theirs, segments, name=side or "plain")


def test_dynamic_rope_is_that_of_the_length_of_each_row():
    """Transformers takes the longest row of a batch, and of those before it: rows alone, the shortest first."""
    model = reference(transformers.AutoModelForCausalLM, DYNAMIC)
    family = family_of(DYNAMIC)
    config = family.config(model.config.to_dict())
    params, (tokens, segments) = converted(model, config, family), batch("right")
    ours = build_model(config).apply({"params": params}, tokens, segments=segments)
    for row, length in reversed(list(enumerate(REAL))):
        theirs = model(**as_torch(tokens[row : row + 1, :length], None)).logits
        assert_same(ours[row : row + 1, :length], theirs, name=f"{length} tokens")


@pytest.mark.parametrize("name", [*DECODERS, "dynamic", *ENCODERS])
def test_a_config_survives_the_way_through_transformers_and_back(name):
    spec = (DECODERS | {"dynamic": DYNAMIC} | ENCODERS)[name]
    family = family_of(spec)
    config = family.config(spec)
    written = family.hf_config(config)
    read = transformers.AutoConfig.for_model(**copy.deepcopy(written))
    assert family.config(written) == config
    assert family.config(read.to_dict()) == config


@pytest.mark.parametrize("name", ["smollm2", "gpt-2", "gemma-3"])
def test_a_decoder_classifies_by_its_last_token_as_transformers_does(name):
    spec = {**DECODERS[name], "pad_token_id": 0, "num_labels": 5}
    family = family_of(spec)
    model = reference(transformers.AutoModelForSequenceClassification, spec)
    config = family.config(model.config.to_dict())
    config = type(config)(**{**vars(config), "num_labels": 5})
    params = converted(model, config, family)
    for side in (None, "right"):
        tokens, segments = batch(side)
        tokens = tokens if segments is None else np.where(segments > 0, tokens, 0)
        theirs = model(**as_torch(tokens, segments)).logits
        ours = build_model(config).apply({"params": params}, tokens, segments=segments)
        assert_same(ours, theirs, name=side or "plain")


@pytest.mark.parametrize("name", POOLED)
def test_every_encoder_family_computes_the_features_of_transformers(name):
    family = FAMILIES[name]
    model = reference(transformers.AutoModel, ENCODERS[name], add_pooling_layer=True)
    config = family.config(model.config.to_dict())
    config = type(config)(**{**vars(config), "pooling": "pooler"})
    state = torch.nn.ModuleDict({family.prefix.rstrip("."): model})
    params = converted(state, config, family)
    for side in (None, "right"):
        tokens, segments = batch(side)
        inputs = as_torch(tokens, segments)
        inputs.pop("position_ids", None)
        theirs = model(**inputs)
        ours = build_model(config).apply({"params": params}, tokens, segments=segments)
        pooled = build_model(config).apply({"params": params}, tokens, segments=segments, method="pooled")
        assert_same(ours, theirs.last_hidden_state, segments, name=side or "plain")
        assert_same(pooled, theirs.pooler_output, name=side or "plain")


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_family_classifies_as_transformers_does(name):
    family = FAMILIES[name]
    model = reference(transformers.AutoModelForSequenceClassification, ENCODERS[name], num_labels=5)
    config = family.config(model.config.to_dict())
    config = type(config)(**{**vars(config), "num_labels": 5})
    params = converted(model, config, family)
    for side in (None, "right"):
        tokens, segments = batch(side)
        types = np.arange(T)[None, :].repeat(B, 0) >= 5 if config.types > 1 else np.zeros((B, T))
        inputs = as_torch(tokens, segments)
        inputs |= {"token_type_ids": torch.tensor(types, dtype=torch.long)} if config.types else {}
        inputs.pop("position_ids", None)
        theirs = model(**inputs).logits
        ours = build_model(config).apply({"params": params}, tokens, segments, types.astype(np.int32))
        assert_same(ours, theirs, name=side or "plain")
