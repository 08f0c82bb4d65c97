"""What is refused of the further forms of PEFT's format: each complaint names its culprit."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from lowrank import pretrained
from lowrank.adapters import peft
from lowrank.core.errors import UserError
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted

GROUPS = {
    "loha": {"name": "loha", "rank": 2},
    "lokr": {"name": "lokr", "rank": 2},
    "hira": {"name": "hira", "rank": 2},
    "vera": {"name": "vera", "rank": 4},
    "adalora": {"name": "adalora", "init_rank": 4, "target_rank": 2},
    "oft": {"name": "oft", "block": 4},
    "boft": {"name": "boft", "block": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained.load(str(tiny.llama(tmp_path_factory.mktemp("hf") / "tiny-llama")))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """`{name: (JSON, tensors)}` of an adapter of each form."""
    found = {}
    for name, group in GROUPS.items():
        folder = peft.save(adapted(base.params, group)[0], base, tmp_path_factory.mktemp(name), method=group)
        found[name] = (
            json.loads((folder / "adapter_config.json").read_text()),
            load_file(folder / "adapter_model.safetensors"),
        )
    return found


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("loha", {"r": 0}, "rank for .* is 0"),
        ("loha", {"alpha": -1}, "alpha for .* is -1"),
        ("loha", {"lora_alpha": 3}, r"lora_alpha=3 is not supported \(did you mean 'alpha"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor is 0: it must be -1 or at least 1"),
        ("lokr", {"decompose_factor": 16}, r"lokr_w2_a does not belong to a module|lokr_w1 has shape"),
        ("hira", {"r": 3}, r"hira_A has shape \(2, 16\); this base and config need \(3, 16\)"),
        ("vera", {"save_projection": False}, "base_model.vera_A does not belong to a module"),
        ("adalora", {"init_r": 2**40, "rank_pattern": None}, r"lora_A has shape \(4, 16\).* \(1099511627776, 16\)"),
        ("vera", {"bias": "lora_only"}, "unknown bias in adapter_config.json: 'lora_only'.*vera_only"),
        ("oft", {"oft_block_size": None}, "needs one of oft_block_size and r above 0"),
        ("oft", {"r": 4}, "needs one of oft_block_size and r above 0 and the other 0"),
        ("oft", {"use_cayley_neumann": True}, "needs PEFT 0.18 or later and at least 3 terms"),
        (
            "oft",
            {"use_cayley_neumann": True, "peft_version": "0.21.2", "num_cayley_neumann_terms": 2},
            "at least 3 terms",
        ),
        ("oft", {"oft_block_size": 8}, r"oft_R.weight has shape \(4, 6\)"),
        (
            "boft",
            {"boft_n_butterfly_factor": 4},
            "block size 4 and boft_n_butterfly_factor=4 do not divide 16 inputs",
        ),
        ("boft", {"boft_n_butterfly_factor": 2**64}, "boft_n_butterfly_factor=18446744073709551616 do not divide"),
        ("boft", {"boft_block_num": 10**9, "boft_block_size": 0}, "block size 0 and .* do not divide"),
        (
            "oft",
            {"use_cayley_neumann": True, "peft_version": "0.21.2", "num_cayley_neumann_terms": {}},
            "num_cayley_neumann_terms is {}: it must be a whole number",
        ),
        ("boft", {"boft_block_num": 4}, "needs one of boft_block_size and boft_block_num"),
    ],
)
def test_a_config_that_would_change_the_maths_unseen_is_refused(name, change, message, base, saved, tmp_path):
    config, tensors = saved[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        peft.load(tmp_path, base.params, base)


@pytest.mark.parametrize("name", GROUPS)
def test_every_tensor_must_be_there(name, base, saved, tmp_path):
    config, tensors = saved[name]
    for key in (max(tensors), min(tensors)):  # of a module, and at the root where there are such
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file({k: x for k, x in tensors.items() if k != key}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=f"{key} is missing"):
            peft.load(tmp_path, base.params, base)
