"""Adapters on disk, checked against PEFT's formulas in NumPy, and everything that is refused."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lowrank import methods, pretrained
from lowrank.adapters import peft
from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.weight import is_weight
from tests.support import checkpoint_files as files
from tests.support import peft_formulas
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.close import assert_close
from tests.support.peft_formulas import PREFIX
from tests.support.thinning import leave

merge = jax.jit(weight.merge)
ATTN = r".*attn/(q|k|v|o)/kernel"
PATTERNS = {"rank_pattern": {r".*attn/k/kernel": 1, r"layers/1/attn/q/kernel": 5, r"layers/2/attn/v/kernel": 0}}
PATTERNS |= {"alpha_pattern": {r".*attn/v/kernel": 3.0, r"layers/0/.*": 20.0}}
LOKR_PATTERNS = {**PATTERNS, "rank_pattern": {r".*attn/k/kernel": 1, r"layers/2/attn/v/kernel": 0}}
LOW = {"rank_pattern": {r"layers/1/attn/q/kernel": 1, r"layers/2/attn/v/kernel": 0}}
GROUPS = {
    "lora": {"name": "lora", "rank": 3, "alpha": 10.0, "target": ATTN, **PATTERNS},
    "rslora": {"name": "lora", "rank": 3, "alpha": 7.0, "rslora": True, "target": ATTN, **PATTERNS},
    "pissa": {"name": "lora", "rank": 3, "alpha": 7.0, "init": "pissa", "target": ATTN, **PATTERNS},
    "olora": {"name": "lora", "rank": 3, "alpha": 7.0, "init": "olora", "target": ATTN, **PATTERNS},
    "lora_xs": {"name": "lora_xs", "rank": 3, "alpha": 7.0, "target": ATTN, **PATTERNS},
    "edora": {"name": "edora", "rank": 3, "alpha": 7.0, "target": ATTN, **PATTERNS},
    "adalora": {"name": "adalora", "init_rank": 4, "target_rank": 2, "alpha": 7.0, "target": ATTN},
    "dora": {"name": "dora", "rank": 3, "alpha": 10.0, "target": ATTN, **PATTERNS},
    "ia3": {"name": "ia3"},
    "loha": {"name": "loha", "rank": 3, "alpha": 10.0, "target": ATTN, **PATTERNS},
    "lokr": {"name": "lokr", "rank": 3, "alpha": 10.0, "target": ATTN, **LOKR_PATTERNS},
    "lokr low rank": {"name": "lokr", "rank": 2, "factor": 2, "target": r".*attn/(q|v)/kernel", **LOW},
    "lokr both": {"name": "lokr", "rank": 1, "alpha": 3.0, "factor": 8, "decompose_both": True, "target": ATTN},
    "hira": {"name": "hira", "rank": 3, "target": ATTN, "rank_pattern": PATTERNS["rank_pattern"]},
    "vera": {"name": "vera", "rank": 20, "target": r".*attn/(q|k|v|o)/kernel|.*mlp/down/kernel"},
    "oft": {"name": "oft", "block": 8, "target": r".*(attn/(q|v)|mlp/down)/kernel"},
    "oft shared": {"name": "oft", "block": 4, "share": True, "target": ATTN},
    "oft series": {"name": "oft", "block": 4, "terms": 5, "target": ATTN},
    "boft": {"name": "boft", "block": 4, "factors": 3, "target": r".*(attn/(q|v)|mlp/down)/kernel"},
    "boft one factor": {"name": "boft", "block": 4, "factors": 1, "target": ATTN},
    "bias": {"name": "lora", "bias": "all"},
    "its bias": {"name": "lora", "bias": "lora_only"},
}

VARIANTS = (
    *("rslora", "olora", "lokr low rank", "lokr both", "oft shared", "oft series", "boft one factor"),
    "bias",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained.load(str(tiny.llama(tmp_path_factory.mktemp("hf") / "tiny-llama")))


@pytest.fixture(scope="module")
def trees(base):
    """`name of a group -> (parameters after some training, names of the trained leaves)`."""
    return functools.cache(lambda name: adapted(base.params, GROUPS[name]))


@pytest.fixture(params=leave(GROUPS, VARIANTS))
def case(request, trees):
    return GROUPS[request.param], *trees(request.param)


@pytest.fixture
def saved(base, trees, tmp_path):
    """The folder of an adapter."""
    params, trained = trees("lora")
    return peft.save(params, base, tmp_path / "adapter", trained=trained, method=GROUPS["lora"])


def read(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def as_torch(base, params):
    """A plain tree as torch's tensors."""
    leaves, out = dict(tree.named_leaves(params)), {}
    for tensor in pretrained.families.FAMILIES[base.family].tensors(base.config):
        for i, name in enumerate(tensor.names):
            array = np.asarray(leaves[tensor.leaf][i] if tensor.count else leaves[tensor.leaf])
            out[name] = array.T if tensor.transpose else array
    return out


def test_the_files_alone_give_the_merged_model_by_the_formulas_of_peft(base, case, tmp_path):
    group, params, trained = case
    peft.save(params, base, tmp_path, trained=trained, method=group, original=base.params)
    expected = peft_formulas.merged(*read(tmp_path), as_torch(base, base.params))
    for name, array in as_torch(base, merge(params)).items():
        assert_close(array, expected[name], name=name)


def test_what_is_written_is_read_back(base, case, tmp_path):
    group, params, trained = case
    peft.save(params, base, tmp_path, trained=trained, method=group, original=base.params)
    back = peft.load(tmp_path, base.params, base)
    for (name, x), (_, y) in zip(tree.named_leaves(merge(params)), tree.named_leaves(merge(back)), strict=True):
        assert_close(x, y, name=name)
    again = tmp_path / "again"
    peft.save(back, base, again, trained=[n for n in trained if n.endswith("bias")], method=group, original=base.params)
    first, second = read(tmp_path), read(again)
    assert first[0] == second[0]
    assert all(np.array_equal(x, second[1][key]) for key, x in first[1].items())


def test_every_form_of_the_table_is_held_to_these_tests(trees):
    forms = {
        type(w) for name in GROUPS if name not in VARIANTS for w in jax.tree.leaves(trees(name)[0], is_leaf=is_weight)
    }
    assert {form.kind for form in peft.FORMS.values()} <= forms


def test_the_files_are_what_peft_expects(saved):
    config, tensors = read(saved)
    assert {config[k] for k in ("peft_type", "task_type", "bias")} == {"LORA", "CAUSAL_LM", "none"}
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["inference_mode"] is True
    assert all(x.dtype == np.float32 for x in tensors.values())
    with safe_open(saved / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_weights_share_is_written_from_the_root_of_the_tree(base, tmp_path):
    method = methods.build_method(GROUPS["vera"])
    params = methods.attach(method, base.params, jax.random.key(0))
    peft.save(params, base, tmp_path, method=GROUPS["vera"])
    tensors = read(tmp_path)[1]
    assert tensors["base_model.vera_A"].shape == (20, 32)
    assert tensors["base_model.vera_B"].shape == (16, 20)
    back = peft.load(tmp_path, base.params, base)
    jax.tree.map(np.testing.assert_array_equal, back, method.bind(params, None, None))
    unbound = {name: child for name, child in params.items() if name != methods.SHARED}
    with pytest.raises(UserError, match="matrices under shared/ are missing"):
        peft.save(unbound, base, tmp_path)


def test_padding_is_stripped_and_a_layer_of_rank_0_is_not_there(saved):
    config, tensors = read(saved)
    ranks = {k: x.shape[0] for k, x in tensors.items() if k.endswith("lora_A.weight")}
    of = lambda name: [ranks.get(f"{PREFIX}model.layers.{i}.self_attn.{name}_proj.lora_A.weight") for i in range(3)]  # noqa: E731
    assert [of(n) for n in "qkvo"] == [[3, 5, 3], [1, 1, 1], [3, 3, None], [3, 3, 3]]
    assert (config["r"], config["lora_alpha"]) == (3, 10)
    assert config["rank_pattern"] == {"k_proj": 1, "layers.1.self_attn.q_proj": 5}
    assert "layers.0.self_attn.v_proj" in config["target_modules"]


def test_a_smaller_adapter_fills_the_other_layers_with_rank_0(base, saved):
    w = peft.load(saved, base.params, base)["layers"]["attn"]["v"]["kernel"]
    assert w.a.shape[-1] == 3
    assert [bool(np.any(w.delta()[i])) for i in range(3)] == [True, True, False]


def test_a_classifier_brings_its_head_along_and_says_how_many_labels_it_has(tmp_path):
    folder = tiny.bert(tmp_path / "bert")
    first = pretrained.load(str(folder), model={"num_labels": 3}, seed=1)
    other = pretrained.load(str(folder), model={"num_labels": 3}, seed=2)
    params = methods.attach(methods.build_method({"name": "lora"}), first.params, jax.random.key(0))
    peft.save(params, first, tmp_path / "adapter", trained=["head/kernel", "head/bias"])
    assert peft.describe_adapter(tmp_path / "adapter")[:4] == ("LORA", "bert", {"num_labels": 3}, None)
    head = peft.load(tmp_path / "adapter", other.params, other)["head"]["kernel"]
    assert not np.array_equal(other.params["head"]["kernel"], first.params["head"]["kernel"])
    np.testing.assert_array_equal(head, first.params["head"]["kernel"])
    assert read(tmp_path / "adapter")[0]["task_type"] == "SEQ_CLS"


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": {}}, "lora_alpha is {}: it must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*: it must be a number"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [[], 1, 1, 1]}}, "must be a list of 4 bools"),
    ],
)
def test_numbers_of_adalora_are_numbers(base, trees, tmp_path, change, message):
    params, trained = trees("adalora")
    peft.save(params, base, tmp_path, trained=trained, method=GROUPS["adalora"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        peft.load(tmp_path, base.params, base)


def renamed(tensors, old, new):
    return {new if k == old else k: x for k, x in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: x for k, x in t.items() if k != f"{Q}.lora_A.weight"}, rf"{Q}.lora_A.weight is missing"),
        (
            lambda t: t | {f"{Q}.lora_C.weight": t[f"{Q}.lora_A.weight"]},
            r"q_proj.lora_C.weight does not belong to a module",
        ),
        (
            lambda t: renamed(t, f"{Q}.lora_A.weight", f"{Q}.lora_a.weight"),
            rf"lora_a.weight does not belong to a module .*did you mean '{Q}.lora_A.weight'",
        ),
        (lambda t: t | {f"{Q}.lora_A.weight": np.ones((3, 9), np.float32)}, r"has shape \(3, 9\); .* need \(3, 16\)"),
        (lambda t: t | {f"{Q}.lora_B.weight": np.full((16, 3), np.nan, np.float32)}, "q_proj.lora_B.weight holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(base, saved, change, message):
    file = saved / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError, match=message):
        peft.load(saved, base.params, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "GLORA"}, r"unknown peft_type in .* 'GLORA' \(did you mean 'LORA'\?\); known: .*IA3.* LORA"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"use_rslroa": True}, r"use_rslroa=True is not supported \(did you mean 'use_rslora'\?\)"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"init_lora_weights": "cordon"}, "init_lora_weights='cordon' is not supported; known: True"),
        ({"init_lora_weights": "corda"}, "has init_lora_weights=corda, which changed its base: convert it in peft"),
        ({"target_modules": ["q_prj"]}, r"match no module of the base"),
        ({"target_modules": ["input_layernorm"]}, "input_layernorm; LORA is supported on linear layers and the token"),
        ({"target_modules": "*"}, "is not a regular expression"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "layers_to_transform needs"),
        ({"modules_to_save": ["lm_hed"]}, r"unknown module in modules_to_save: 'lm_hed' \(did you mean 'lm_head'\?\)"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing"),
        ({"bias": "some"}, "unknown bias in adapter_config.json: 'some'"),
        ({"bias": "all"}, r"bias is missing"),
        ({"r": 0}, "rank for .* is 0"),
        ({"lora_alpha": -1}, "alpha for .* is -1"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"base_model_name_or_path": "someone/else"}, "is for base 'someone/else', the loaded base is 'tiny-llama'"),
    ],
)
def test_a_config_that_would_change_the_maths_unseen_is_refused(base, saved, change, message):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        peft.load(saved, base.params, base)


def test_another_base_is_refused_by_its_shapes_and_let_in_by_name_when_asked(base, saved, tmp_path):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "someone/else"}))
    assert peft.load(saved, base.params, base, any_base=True)
    other = pretrained.load(str(tiny.bert(tmp_path / "bert")))
    with pytest.raises(UserError, match="match no module of the base"):
        peft.load(saved, other.params, other, any_base=True)
    wide = pretrained.load(str(files.directory(tmp_path / "wide", {**files.LLAMA, "hidden_size": 32})))
    with pytest.raises(UserError, match=r"has shape \(3, 16\); this base and config need \(3, 32\)"):
        peft.load(saved, wide.params, wide, any_base=True)


@pytest.mark.parametrize(
    ("recorded", "fits"),
    [("tiny-llama", True), ("org/Tiny-Llama", True), ("/models/tiny-llama/", True), ("org/tiny", False), (None, True)],
)
def test_a_base_is_known_by_the_last_part_of_its_name_when_one_side_says_no_more(base, saved, recorded, fits):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": recorded}))
    if fits:
        assert peft.load(saved, base.params, base)
    else:
        with pytest.raises(UserError, match="is for base"):
            peft.load(saved, base.params, base)


def test_unreadable_folders_are_one_clear_line(base, saved, tmp_path):
    with pytest.raises(UserError, match="holds no PEFT adapter"):
        peft.load(tmp_path, base.params, base)
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"cannot read .*adapter_model.safetensors"):
        peft.load(saved, base.params, base)
    file.rename(saved / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle, which is never read"):
        peft.load(saved, base.params, base)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read as JSON"):
        peft.load(saved, base.params, base)


def test_what_the_format_cannot_hold_is_not_written(base, trees, tmp_path):
    lora, _ = trees("lora")
    with pytest.raises(UserError, match="cannot hold the trained leaf layers/mlp/up/kernel"):
        peft.save(lora, base, tmp_path, trained=["layers/mlp/up/kernel"])
    with pytest.raises(UserError, match="cannot hold the trained leaf layers/attn/q/kernel/base"):
        peft.save(lora, base, tmp_path, trained=["layers/attn/q/kernel/base"])
    with pytest.raises(UserError, match="pass original="):
        peft.save(lora, base, tmp_path, method=GROUPS["pissa"])
    with pytest.raises(UserError, match="nothing to write"):
        peft.save(base.params, base, tmp_path)
    both = methods.attach(methods.build_method({"name": "ia3", "target": ATTN}), lora, jax.random.key(0))
    with pytest.raises(UserError, match="Scaled on a LoRA"):
        peft.save(both, base, tmp_path)
    mixed = methods.attach(methods.build_method({"name": "ia3", "target": r".*mlp/up/kernel"}), lora, jax.random.key(0))
    with pytest.raises(UserError, match="one form, not LoRA and Scaled"):
        peft.save(mixed, base, tmp_path)
    assert not list(tmp_path.iterdir())
