"""LoHa, LoKr, HiRA, VeRA, OFT and BOFT go to `peft` and come from it: the logits are the same."""

import copy
import types

import peft
import peft.tuners.boft.layer as boft_layer
import pytest
import torch

from lowrank.adapters import peft as peft_format
from lowrank.core.errors import UserError
from tests.support.adapted_model import adapted
from tests.support.close import assert_close, difference
from tests.support.parity_bases import assert_same_weights, make, our_logits, randomize, their_logits, trained_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning"),
]

ATTN, GPT2_TARGETS = r".*attn/(q|k|v|o)/kernel", r".*(attn/qkv|mlp/down)/kernel"
RANKS = {r".*attn/k/kernel": 2, r"layers/1/attn/q/kernel": 6, r"layers/0/attn/o/kernel": 0}
ALPHAS = {r".*attn/v/kernel": 3.0, r"layers/0/.*": 20.0}
OURS = {
    "loha": (
        "llama",
        {"name": "loha", "rank": 4, "alpha": 10.0, "target": ATTN, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    ),
    "lokr both": (
        "llama",
        {"name": "lokr", "rank": 1, "alpha": 3.0, "decompose_both": True, "target": ATTN, "alpha_pattern": ALPHAS},
    ),
    "lokr whole": ("llama", {"name": "lokr", "rank": 4, "alpha": 3.0, "factor": 8, "target": r".*/(up|down)/kernel"}),
    "hira": ("llama", {"name": "hira", "rank": 4, "target": ATTN, "rank_pattern": RANKS}),
    "gpt2 hira": ("gpt2", {"name": "hira", "rank": 4, "target": GPT2_TARGETS}),
    "vera": ("llama", {"name": "vera", "rank": 40, "target": r".*(attn/(q|k|o)|mlp/down)/kernel"}),
    "gpt2 vera": ("gpt2", {"name": "vera", "rank": 16, "target": GPT2_TARGETS}),
    "oft": ("llama", {"name": "oft", "block": 8, "target": r".*(attn/(q|k|o)|mlp/down)/kernel"}),
    "oft series": ("llama", {"name": "oft", "block": 4, "terms": 5, "share": True, "target": ATTN}),
    "boft": ("llama", {"name": "boft", "block": 4, "factors": 3, "target": ATTN}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make(lambda: tmp_path_factory.mktemp("base"), ("llama", "gpt2"))


@pytest.fixture(autouse=True)
def blocks_without_cuda(monkeypatch):
    """PEFT's BOFT has its butterflies only with a CUDA extension, which does this."""
    diagonal = types.SimpleNamespace(forward=lambda x: (torch.stack([torch.block_diag(*blocks) for blocks in x]),))
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: diagonal)


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_our_adapter_and_computes_our_logits(case, bases, tmp_path):
    name, group = OURS[case]
    model, base, plain = bases[name]
    params, trained = adapted(plain, group)
    peft_format.save(params, base, tmp_path, trained=trained, method=group)
    back = peft_format.load(tmp_path, plain, base)
    theirs = their_logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path))
    assert difference(their_logits(model), theirs) > 0.02  # the adapter does something
    assert_close(our_logits(base, back), theirs, relative=5e-5)
    assert_same_weights(params, back)


QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
THEIR_RANKS = {"k_proj": 2, "layers.1.self_attn.q_proj": 6}
THEIR_ALPHAS = {"v_proj": 3, r"layers\.0\..*q_proj": 20}
THEIRS = {
    "loha patterns": (
        "llama",
        peft.LoHaConfig,
        {"r": 4, "target_modules": QKVO, "rank_pattern": THEIR_RANKS, "alpha_pattern": THEIR_ALPHAS},
    ),
    "loha some layers": (
        "llama",
        peft.LoHaConfig,
        {"r": 3, "alpha": 7, "target_modules": QKVO, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    "lokr": ("llama", peft.LoKrConfig, {"r": 3, "alpha": 10, "target_modules": QKVO, "decompose_factor": 4}),
    "lokr both": (
        "llama",
        peft.LoKrConfig,
        {"r": 2, "alpha": 5, "decompose_both": True, "target_modules": [*QKVO, "down_proj"], "decompose_factor": 6},
    ),
    "lokr patterns": (
        "llama",
        peft.LoKrConfig,
        {"r": 2, "target_modules": QKVO, "rank_pattern": {"k_proj": 5}, "alpha_pattern": THEIR_ALPHAS},
    ),
    "hira": ("llama", peft.HiraConfig, {"r": 4, "target_modules": QKVO, "rank_pattern": THEIR_RANKS}),
    "gpt2 hira": (
        "gpt2",
        peft.HiraConfig,
        {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "vera": ("llama", peft.VeraConfig, {"r": 40, "target_modules": [*QKVO, "down_proj"]}),
    "vera by its seed": (
        "llama",
        peft.VeraConfig,
        {"r": 8, "target_modules": [*QKVO, "up_proj"], "save_projection": False, "projection_prng_key": 7},
    ),
    "oft": (
        "llama",
        peft.OFTConfig,
        {"oft_block_size": 8, "use_cayley_neumann": False, "target_modules": QKVO, "bias": "oft_only"},
    ),
    "oft series, blocks that do not divide": (
        "llama",
        peft.OFTConfig,
        {"oft_block_size": 6, "num_cayley_neumann_terms": 7, "target_modules": [*QKVO, "down_proj"]},
    ),
    "oft series of three terms": (
        "llama",
        peft.OFTConfig,
        {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 3, "target_modules": [*QKVO, "down_proj"]},
    ),
    "coft": (
        "llama",
        peft.OFTConfig,
        {"oft_block_size": 4, "coft": True, "eps": 0.7, "block_share": True, "target_modules": QKVO},
    ),
    "boft": (
        "llama",
        peft.BOFTConfig,
        {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "target_modules": QKVO, "bias": "boft_only"},
    ),
    "boft by number": (
        "llama",
        peft.BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 2, "target_modules": ["o_proj"]},
    ),
    "gpt2 vera": (
        "gpt2",
        peft.VeraConfig,
        {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_an_adapter_of_peft_and_compute_its_logits(case, bases, tmp_path):
    name, kind, options = THEIRS[case]
    model, base, plain = bases[name]
    theirs = peft.get_peft_model(copy.deepcopy(model), kind(**options)).eval()
    randomize([(n, p) for n, p in theirs.named_parameters() if p.requires_grad], seed=5)
    theirs.save_pretrained(tmp_path)
    mine = peft_format.load(tmp_path, plain, base)
    expected = their_logits(theirs)
    assert difference(their_logits(model), expected) > 0.02
    assert_close(our_logits(base, mine), expected, relative=2e-4)
    again = peft_format.save(mine, base, tmp_path / "again", trained=trained_in(theirs, base))
    assert_same_weights(mine, peft_format.load(again, plain, base))


@pytest.mark.parametrize("name", ["loha", "lokr", "oft", "boft"])
def test_what_peft_has_on_linear_layers_only_is_not_written_for_a_conv1d(name, bases, tmp_path):
    _, base, plain = bases["gpt2"]
    params, trained = adapted(plain, {"name": name, "target": GPT2_TARGETS})
    with pytest.raises(UserError, match=f"is a Conv1D, on which PEFT does not support {name.upper()}"):
        peft_format.save(params, base, tmp_path, trained=trained)
