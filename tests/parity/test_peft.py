"""Adapters go to `peft` and come from it, and the logits are the same: a grouped-query Llama, GPT-2's Conv1D, heads."""

import copy
import dataclasses
import json
import types

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from lowrank import peft_format, tree
from lowrank.errors import UserError
from lowrank.models import build
from lowrank.pretrained.families import FAMILIES
from lowrank.weight import merge
from tests.adapted import adapted
from tests.models.tiny import QUICK

# A missing tensor is only a warning in peft, so warnings stay errors but for those of its own making.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
LIMIT, VOCAB, LABELS = 1e-4, 61, 3
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
    "gpt2": (LM, "gpt2", GPT2),
    "llama classifier": (CLASSIFIER, "llama", {**LLAMA, "num_labels": LABELS, "pad_token_id": 0}),
    "roberta classifier": (CLASSIFIER, "roberta", {**ROBERTA, "num_labels": LABELS, "pad_token_id": 1}),
}
TOKENS = np.random.default_rng(0).integers(5, VOCAB, (3, 12)).astype(np.int32)


def reference(name, folder):
    """The transformers model, with random weights and biases far from their initial values."""
    auto, model_type, spec = BASES[name]
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


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`{name: (transformers model, our base, our parameters)}`."""
    models = {name: reference(name, tmp_path_factory.mktemp("base")) for name in BASES}
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
    model = build(base.config)
    apply = jax.jit(lambda p: model.apply({"params": p}, TOKENS, segments=np.ones_like(TOKENS)), compiler_options=QUICK)
    return np.asarray(apply(params))


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def gap(a, b):
    worst = float(np.abs(a - b).max())
    print(f"max |delta logits| {worst:.1e} of {np.abs(b).max():.1f}")
    return worst


Q, QV, ATTN = r"layers/attn/q/kernel", r".*attn/(q|v)/kernel", r".*attn/(q|k|v|o)/kernel"
PATTERNS = {
    "rank_pattern": {r".*attn/k/kernel": 2, r"layers/1/attn/q/kernel": 6},
    "alpha_pattern": {r".*attn/v/kernel": 3.0, r"layers/0/.*": 20.0},
}
GONE = {"rank_pattern": {r"layers/0/attn/q/kernel": 0, r"layers/2/attn/v/kernel": 1}}
GPT2_TARGETS = r".*(attn/qkv|mlp/down)/kernel"
OURS = {
    "alpha is not r": ("llama", {"name": "lora", "rank": 4, "alpha": 10.0, "target": ATTN}),
    "rslora": ("llama", {"name": "lora", "rank": 4, "alpha": 6.0, "rslora": True, "target": ATTN}),
    "patterns": ("llama", {"name": "lora", "rank": 4, "alpha": 10.0, "target": ATTN, **PATTERNS}),
    "rslora patterns": ("llama", {"name": "lora", "rank": 4, "alpha": 7.0, "rslora": True, "target": ATTN, **PATTERNS}),
    "layers without": ("llama", {"name": "lora", "rank": 3, "alpha": 7.0, "target": QV, **GONE}),
    "every kernel": ("llama", {"name": "lora", "rank": 3, "alpha": 7.0, "target": r"(layers|head)/.*kernel"}),
    "bias all": ("llama", {"name": "lora", "rank": 4, "bias": "all", "target": QV}),
    "bias lora_only": ("llama", {"name": "lora", "rank": 4, "bias": "lora_only", "target": QV}),
    "pissa": ("llama", {"name": "lora", "rank": 4, "alpha": 10.0, "init": "pissa", "target": ATTN, **PATTERNS}),
    "olora": ("llama", {"name": "lora", "rank": 4, "alpha": 10.0, "init": "olora", "target": ATTN}),
    "lora_fa": ("llama", {"name": "lora_fa", "rank": 4, "alpha": 10.0, "target": ATTN}),
    "lora_xs": ("llama", {"name": "lora_xs", "rank": 4, "alpha": 3.0, "target": ATTN, **PATTERNS}),
    "edora": ("llama", {"name": "edora", "rank": 4, "alpha": 3.0, "target": ATTN}),
    "dora": ("llama", {"name": "dora", "rank": 4, "alpha": 10.0, "target": ATTN}),
    "dora patterns": ("llama", {"name": "dora", "rank": 4, "alpha": 10.0, "target": ATTN, **PATTERNS}),
    "dora layers without": ("llama", {"name": "dora", "rank": 3, "alpha": 7.0, "target": QV, **GONE}),
    "dora pissa": ("llama", {"name": "dora", "rank": 4, "init": "pissa", "target": QV}),
    "ia3": ("llama", {"name": "ia3"}),
    "gpt2": ("gpt2", {"name": "lora", "rank": 4, "alpha": 10.0, "target": GPT2_TARGETS}),
    "gpt2 bias": ("gpt2", {"name": "lora", "rank": 4, "bias": "all", "target": GPT2_TARGETS}),
    "gpt2 dora": ("gpt2", {"name": "dora", "rank": 4, "alpha": 10.0, "target": GPT2_TARGETS}),
    "gpt2 ia3": ("gpt2", {"name": "ia3", "target": r".*attn/(qkv|o)/kernel"}),
    "llama classifier": ("llama classifier", {"name": "lora", "rank": 4, "target": QV}),
    "roberta classifier": ("roberta classifier", {"name": "dora", "rank": 4, "target": r".*(attn/q|mlp/down)/kernel"}),
    "roberta ia3": ("roberta classifier", {"name": "ia3"}),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_our_adapter_and_computes_our_logits(case, bases, tmp_path):
    name, group = OURS[case]
    model, base, plain = bases[name]
    params, trained = adapted(plain, group, train=("head/.*",) if base.config.num_labels else ())
    peft_format.save(params, base, tmp_path, trained=trained, method=group, original=plain)
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    mine = our_logits(base, params)
    assert gap(their_logits(model), theirs) > 0.1  # the adapter does something
    assert gap(mine, theirs) <= LIMIT
    assert_same_weights(params, peft_format.load(tmp_path, plain, base))


QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
THEIR_PATTERNS = {
    "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 6},
    "alpha_pattern": {"v_proj": 3, r"layers\.0\..*q_proj": 20},
}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
THEIRS = {
    "alpha is not r": ("llama", peft.LoraConfig, {"r": 4, "lora_alpha": 10, "target_modules": QKVO}),
    "rslora": ("llama", peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": QKVO}),
    "patterns": ("llama", peft.LoraConfig, {"r": 4, "lora_alpha": 10, "target_modules": QKVO, **THEIR_PATTERNS}),
    "rslora patterns": (
        "llama",
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": QKVO, **THEIR_PATTERNS},
    ),
    "regex": ("llama", peft.LoraConfig, {"r": 4, "target_modules": r".*\.(0|2)\..*(q_proj|down_proj)"}),
    "all-linear": ("llama", peft.LoraConfig, {"r": 2, "target_modules": "all-linear"}),
    "head": ("llama", peft.LoraConfig, {"r": 2, "target_modules": ["lm_head", "layers.2.mlp.up_proj"]}),
    "some layers": (
        "llama",
        peft.LoraConfig,
        {"r": 4, "target_modules": QKVO, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    "one layer": ("llama", peft.LoraConfig, {"r": 4, "target_modules": QKVO, "layers_to_transform": 1}),
    "excluded": (
        "llama",
        peft.LoraConfig,
        {"target_modules": QKVO, "exclude_modules": ["k_proj", "1.self_attn.q_proj"]},
    ),
    "excluded by regex": ("llama", peft.LoraConfig, {"target_modules": QKVO, "exclude_modules": r".*\.1\..*"}),
    "bias all": ("llama", peft.LoraConfig, {"r": 4, "bias": "all", "target_modules": ["q_proj"]}),
    "bias lora_only": ("llama", peft.LoraConfig, {"r": 4, "bias": "lora_only", "target_modules": ["q_proj"]}),
    "saved head": ("llama", peft.LoraConfig, {"target_modules": QKVO, "modules_to_save": ["lm_head"]}),
    "dora": ("llama", peft.LoraConfig, {"r": 4, "lora_alpha": 10, "use_dora": True, "target_modules": QKVO}),
    "dora patterns": (
        "llama",
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 10, "use_dora": True, "target_modules": QKVO, **THEIR_PATTERNS},
    ),
    "dora one layer": (
        "llama",
        peft.LoraConfig,
        {"r": 4, "use_dora": True, "target_modules": QKVO, "layers_to_transform": 1},
    ),
    "ia3": ("llama", peft.IA3Config, IA3),
    "ia3 with biases": ("llama", peft.IA3Config, {"target_modules": QKVO, "feedforward_modules": ["o_proj"]}),
    "ia3 regex": (
        "llama",
        peft.IA3Config,
        {"target_modules": r".*\.1\..*(k|down)_proj", "feedforward_modules": r".*down_proj"},
    ),
    "gpt2": ("gpt2", peft.LoraConfig, {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2 both projections": (
        "gpt2",
        peft.LoraConfig,
        {"r": 4, "target_modules": ["c_proj", "c_fc"], "bias": "all", "fan_in_fan_out": True},
    ),
    "gpt2 dora": (
        "gpt2",
        peft.LoraConfig,
        {"r": 4, "use_dora": True, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "gpt2 ia3": (
        "gpt2",
        peft.IA3Config,
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "llama classifier": ("llama classifier", peft.LoraConfig, {"task_type": "SEQ_CLS", "target_modules": QKVO}),
    "llama classifier, bias": (
        "llama classifier",
        peft.LoraConfig,
        {"task_type": "SEQ_CLS", "target_modules": QKVO, "bias": "all"},
    ),
    "roberta classifier": (
        "roberta classifier",
        peft.LoraConfig,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "attention.output.dense"], "bias": "all"},
    ),
    "roberta all-linear": (
        "roberta classifier",
        peft.LoraConfig,
        {"task_type": "SEQ_CLS", "target_modules": "all-linear", "use_dora": True},
    ),
    "roberta ia3": (
        "roberta classifier",
        peft.IA3Config,
        {
            "task_type": "SEQ_CLS",
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": r".*layer\.\d+\.output\.dense",
        },
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_an_adapter_of_peft_and_compute_its_logits(case, bases, tmp_path):
    name, kind, options = THEIRS[case]
    model, base, plain = bases[name]
    theirs = peft.get_peft_model(copy.deepcopy(model), kind(**options)).eval()
    randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5, size=0.7)
    theirs.save_pretrained(tmp_path)
    mine = peft_format.load(tmp_path, plain, base)
    expected = their_logits(theirs)
    assert gap(their_logits(model), expected) > 0.1
    assert gap(our_logits(base, mine), expected) <= LIMIT
    again = peft_format.save(mine, base, tmp_path / "again", trained=trained_in(theirs, base))
    assert_same_weights(mine, peft_format.load(again, plain, base))


def assert_same_weights(params, others):
    for (name, x), (_, y) in zip(tree.named_leaves(merge(params)), tree.named_leaves(merge(others)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)


def trained_in(theirs, base):
    """The leaves beside the adapter's own that an adapter of peft brings along."""
    model = theirs.base_model.model
    learnt = {n for n, p in model.named_parameters() if p.requires_grad}
    learnt = {n.replace(".base_layer", "").replace(".modules_to_save.default", "") for n in learnt}
    return {t.leaf for t in FAMILIES[base.family].tensors(base.config) if learnt & set(t.names)}


def test_missing_json_keys_take_the_defaults_of_peft(bases, tmp_path):
    model, base, plain = bases["llama"]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    randomize([(n, p) for n, p in theirs.named_parameters() if "lora_" in n], seed=5)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    expected = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert gap(our_logits(base, peft_format.load(tmp_path, plain, base)), expected) <= LIMIT


def test_a_residual_base_of_peft_is_refused_with_the_way_out(bases, tmp_path):
    model, base, plain = bases["llama"]
    options = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="init_lora_weights='pissa' is not supported"):
        peft_format.load(tmp_path, plain, base)
