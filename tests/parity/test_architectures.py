"""Every family of `pretrained.architectures`: adapters go to peft and come from it, merged models to transformers."""

import copy

import peft
import pytest
import torch

from lowrank.adapters import export
from lowrank.adapters import peft as peft_format
from lowrank.pretrained import load
from tests.support import parity_bases as bases
from tests.support.adapted_model import adapted
from tests.support.checkpoint_files import write_tokenizer
from tests.support.close import assert_close, difference
from tests.support.parity_bases import LABELS, LM, VOCAB

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SMALL = {k: v for k, v in bases.LLAMA.items() if k not in ("attention_bias", "tie_word_embeddings")}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 6.0, 9.0]}
MODELS = {
    "phi3": {**SMALL, "pad_token_id": 0, "rope_scaling": LONGROPE, "original_max_position_embeddings": 8},
    "olmo2": SMALL,
    "granite": {**SMALL, "residual_multiplier": 0.3, "logits_scaling": 3.0, "embedding_multiplier": 5.0},
    "smollm3": {**SMALL, "pad_token_id": 0, "no_rope_layers": [1, 0, 1]},
    "gemma": {**SMALL, "head_dim": 16},
    "gpt_neox": {**SMALL, "rotary_pct": 0.5},
}
ENCODERS = {
    "distilbert": {"vocab_size": VOCAB, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 40},
    "modernbert": {
        **SMALL,
        "pad_token_id": 0,
        "local_attention": 6,
        "classifier_pooling": "mean",
        "norm_bias": True,
        "attention_bias": True,
    },
}
DEBERTA = {"relative_attention": True, "position_biased_input": False, "share_att_key": True, "position_buckets": 6}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "pad_token_id": 0}
ENCODERS["deberta-v2"] = {**SMALL, **DEBERTA}
SPECS = {name: (LM, name, spec) for name, spec in MODELS.items()}
SPECS |= {name: (bases.CLASSIFIER, name, {**spec, "num_labels": LABELS}) for name, spec in ENCODERS.items()}
LINEAR = r"layers/(attn|mlp)/(q|k|v|qkv|o|gate|up|gate_up|down)/kernel"
GROUPS = {"default": {"name": "lora", "rank": 4, "alpha": 10.0}, "dora": {"name": "dora", "rank": 3, "target": LINEAR}}


@pytest.fixture(scope="module", params=SPECS)
def case(request, tmp_path_factory):
    """`(transformers model, our base as it is read from the model's folder)`."""
    folder = tmp_path_factory.mktemp("base")
    model = bases.reference(request.param, folder, SPECS)
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB)
    options = {"num_labels": LABELS} if SPECS[request.param][0] is bases.CLASSIFIER else {}
    return model, load(str(folder), model=options)


@pytest.mark.parametrize("group", GROUPS)
def test_peft_loads_our_adapter_and_transformers_our_merged_checkpoint(case, group, tmp_path):
    model, base = case
    train = ("head/.*",) if base.config.num_labels else ()
    params, trained = adapted(base.params, GROUPS[group], train=train)
    live, plain = bases.our_logits(base, params), bases.their_logits(model)
    assert difference(plain, live) > 0.02
    peft_format.save(params, base, tmp_path / "adapter", trained=trained, method=GROUPS[group], original=base.params)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    assert_close(bases.their_logits(theirs), live, relative=2e-4, name="adapter")
    export.merge_to_hf(params, base, tmp_path / "merged")
    auto = bases.CLASSIFIER if base.config.num_labels else LM
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager").eval()
    assert_close(bases.their_logits(merged), live, relative=2e-4, name="merged")


def test_we_load_an_adapter_of_peft_on_all_linear_layers(case, tmp_path):
    model, base = case
    # peft cannot adapt DistilBERT's `pre_classifier`: it also saves all modules whose names end with `classifier` whole
    options = {"task_type": "SEQ_CLS", "exclude_modules": ["pre_classifier"]} if base.config.num_labels else {}
    config = peft.LoraConfig(r=3, lora_alpha=10, target_modules="all-linear", **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    bases.randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5, size=0.7)
    theirs.save_pretrained(tmp_path)
    mine = peft_format.load(tmp_path, base.params, base)
    assert_close(bases.our_logits(base, mine), bases.their_logits(theirs), relative=2e-4)


def test_the_checkpoint_of_a_family_is_read_as_transformers_reads_it(case):
    model, base = case
    assert_close(bases.our_logits(base, base.params), bases.their_logits(model), relative=2e-4)
