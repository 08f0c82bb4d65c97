"""Tiny models of transformers, the same in our tree, and what both make of some tokens."""

import dataclasses
import types

import jax
import numpy as np
import torch
import transformers

from lowrank.core import tree
from lowrank.core.weight import merge
from lowrank.models import build_model
from lowrank.pretrained.families import FAMILIES
from tests.support.close import assert_close

VOCAB, LABELS = 61, 3
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
ROBERTA = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "attention_bias", "tie_word_embeddings")}
LM, CLASSIFIER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
BASES = {
    "llama": (LM, "llama", LLAMA),
    "tied llama": (LM, "llama", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": (LM, "gpt2", GPT2),
    "llama classifier": (CLASSIFIER, "llama", {**LLAMA, "num_labels": LABELS, "pad_token_id": 0}),
    "roberta classifier": (CLASSIFIER, "roberta", {**ROBERTA, "num_labels": LABELS, "pad_token_id": 1}),
}
Q, QV, ATTN = r"layers/attn/q/kernel", r".*attn/(q|v)/kernel", r".*attn/(q|k|v|o)/kernel"
GPT2_TARGETS = r".*(attn/qkv|mlp/down)/kernel"
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS = np.random.default_rng(0).integers(5, VOCAB, (3, 12)).astype(np.int32)


def reference(name, folder, bases=BASES):
    """The transformers model, with random weights and biases far from their initial values."""
    auto, model_type, spec = bases[name]
    model = auto.from_config(transformers.AutoConfig.for_model(model_type, **spec), attn_implementation="eager").eval()
    randomize(model.named_parameters(), seed=0)
    model.name_or_path = str(folder)  # peft looks for a config.json there
    model.config.save_pretrained(folder)
    return model


def randomize(parameters, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in parameters:
            noise = torch.randn(p.shape, generator=generator) * size
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim == 2 else p + 0.3 * noise)


def make(make_folder, names=BASES):
    """`{name: (transformers model, our base, our parameters)}`; `make_folder` gives a new folder for a config."""
    models = {name: reference(name, make_folder()) for name in names}
    return {name: (model, *ours(model, BASES[name][1])) for name, model in models.items()}


def ours(model, family):
    """`(base, params)`: the same model in our tree, by the family's table."""
    config = FAMILIES[family].config(model.config.to_dict())
    config = dataclasses.replace(
        config, num_labels=LABELS if "Classification" in type(model).__name__ else 0, remat="none"
    )
    state, params = {n: p.detach().numpy() for n, p in model.named_parameters()}, {}
    for tensor in FAMILIES[family].tensors(config):
        arrays = [state[n].T if tensor.transpose else state[n] for n in tensor.names]
        *path, last = tensor.leaf.split("/")
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jax.numpy.asarray(np.stack(arrays) if tensor.count else arrays[0])
    return types.SimpleNamespace(config=config, family=family, name=model.name_or_path, new=()), params


def our_logits(base, params):
    model = build_model(base.config)
    apply = jax.jit(lambda p: model.apply({"params": p}, TOKENS, segments=np.ones_like(TOKENS)))
    return np.asarray(apply(params))


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def assert_same_weights(params, others):
    for (name, x), (_, y) in zip(tree.named_leaves(merge(params)), tree.named_leaves(merge(others)), strict=True):
        assert_close(x, y, name=name)


def trained_in(theirs, base):
    """The leaves beside the adapter's own that an adapter of peft brings along."""
    model = theirs.base_model.model
    learnt = {n for n, p in model.named_parameters() if p.requires_grad}
    learnt = {n.replace(".base_layer", "").replace(".modules_to_save.default", "") for n in learnt}
    return {t.leaf for t in FAMILIES[base.family].tensors(base.config) if learnt & set(t.names)}
