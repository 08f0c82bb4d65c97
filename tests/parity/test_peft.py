"""Adapters go to `peft` and come from it, and the logits are the same: a grouped-query Llama, GPT-2's Conv1D, heads."""

import copy
import json

import peft
import pytest
import torch

from lowrank.adapters import peft as peft_format
from lowrank.core.errors import UserError
from tests.support.adapted_model import adapted
from tests.support.close import assert_close, difference
from tests.support.parity_bases import (
    ATTN,
    GPT2_TARGETS,
    QKVO,
    QV,
    assert_same_weights,
    make,
    our_logits,
    randomize,
    their_logits,
    trained_in,
)

# A missing tensor is only a warning in peft, so warnings stay errors but for those of its own making.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target:UserWarning"),  # of a tied head
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make(lambda: tmp_path_factory.mktemp("base"))


PATTERNS = {
    "rank_pattern": {r".*attn/k/kernel": 2, r"layers/1/attn/q/kernel": 6},
    "alpha_pattern": {r".*attn/v/kernel": 3.0, r"layers/0/.*": 20.0},
}
WIDE = {"rank_pattern": {"embed/embedding": 6}, "alpha_pattern": {"embed/embedding": 5.0}}
EMBED_AND_HEAD = r"embed/embedding|head/kernel"
GONE = {"rank_pattern": {r"layers/0/attn/q/kernel": 0, r"layers/2/attn/v/kernel": 1}}
OURS = {
    "alpha is not r": ("llama", {"name": "lora", "rank": 4, "alpha": 10.0, "target": ATTN}),
    "rslora": ("llama", {"name": "lora", "rank": 4, "alpha": 6.0, "rslora": True, "target": ATTN}),
    "patterns": ("llama", {"name": "lora", "rank": 4, "alpha": 10.0, "target": ATTN, **PATTERNS}),
    "rslora patterns": ("llama", {"name": "lora", "rank": 4, "alpha": 7.0, "rslora": True, "target": ATTN, **PATTERNS}),
    "layers without": ("llama", {"name": "lora", "rank": 3, "alpha": 7.0, "target": QV, **GONE}),
    "embedding": ("llama", {"name": "lora", "rank": 4, "alpha": 10.0, "target": r"embed/embedding|.*attn/q/kernel"}),
    "embedding and head": ("llama", {"name": "lora", "rank": 4, "rslora": True, "target": EMBED_AND_HEAD}),
    "embedding with patterns": ("llama", {"name": "lora", "rank": 4, "target": QV + "|embed/embedding", **WIDE}),
    "embedding dora": ("llama", {"name": "dora", "rank": 4, "alpha": 10.0, "target": EMBED_AND_HEAD}),
    "tied embedding": ("tied llama", {"name": "lora", "rank": 4, "target": QV + "|embed/embedding", **WIDE}),
    "gpt2 embedding": ("gpt2", {"name": "lora", "rank": 4, "target": r"embed/embedding|.*attn/qkv/kernel"}),
    "roberta embedding": ("roberta classifier", {"name": "lora", "rank": 4, "target": QV + "|embed/embedding"}),
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
    assert difference(their_logits(model), theirs) > 0.02  # the adapter does something
    assert_close(mine, theirs, relative=2e-4)
    assert_same_weights(params, peft_format.load(tmp_path, plain, base))


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
    "embedding": ("llama", peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "embedding by regex": ("llama", peft.LoraConfig, {"r": 4, "target_modules": r".*(embed_tokens|q_proj)"}),
    "embedding dora": ("llama", peft.LoraConfig, {"r": 4, "use_dora": True, "target_modules": ["embed_tokens"]}),
    "embedding pissa": (
        "llama",
        peft.LoraConfig,
        {"r": 4, "init_lora_weights": "olora", "target_modules": ["embed_tokens"]},
    ),
    "tied embedding": ("tied llama", peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding and head": ("tied llama", peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "tied head": ("tied llama", peft.LoraConfig, {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "tied embedding, ensured": (
        "tied llama",
        peft.LoraConfig,
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tied head, ensured": ("tied llama", peft.LoraConfig, {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "gpt2 embedding": ("gpt2", peft.LoraConfig, {"r": 4, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "roberta embedding": (
        "roberta classifier",
        peft.LoraConfig,
        {"task_type": "SEQ_CLS", "target_modules": ["word_embeddings", "query"]},
    ),
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
    assert difference(their_logits(model), expected) > 0.02
    assert_close(our_logits(base, mine), expected, relative=2e-4)
    again = peft_format.save(mine, base, tmp_path / "again", trained=trained_in(theirs, base))
    assert_same_weights(mine, peft_format.load(again, plain, base))


def test_missing_json_keys_take_the_defaults_of_peft(bases, tmp_path):
    model, base, plain = bases["llama"]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    randomize([(n, p) for n, p in theirs.named_parameters() if "lora_" in n], seed=5)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    expected = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert_close(our_logits(base, peft_format.load(tmp_path, plain, base)), expected, relative=2e-5)


RESIDUAL = {
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": QKVO, **THEIR_PATTERNS}),
    "olora rslora": ("llama", {"init_lora_weights": "olora", "use_rslora": True, "target_modules": ["q_proj"]}),
    "gpt2 dora pissa": (
        "gpt2",
        {"init_lora_weights": "pissa", "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_an_adapter_on_what_an_init_left_of_the_base_is_put_on_the_base(case, bases, tmp_path):
    name, options = RESIDUAL[case]
    model, base, plain = bases[name]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=10, **options)).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if p.requires_grad:
                p.mul_(1.3 if "magnitude" in n else 1.0).add_(0.1 * torch.randn(p.shape).clamp(-1, 1))
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] in ("pissa", "olora")
    expected = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert difference(their_logits(model), expected) > 0.02
    mine = peft_format.load(tmp_path, plain, base)
    assert_close(our_logits(base, mine), expected, relative=2e-4)
    again = peft_format.save(mine, base, tmp_path / "again")
    assert_same_weights(mine, peft_format.load(again, plain, base))


def test_an_init_that_the_adapter_does_not_say_is_refused(bases, tmp_path):
    model, base, plain = bases["llama"]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.peft_config["default"].init_lora_weights = "pissa_niter_4"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="init_lora_weights=pissa_niter, which changed its base: convert it"):
        peft_format.load(tmp_path, plain, base)
