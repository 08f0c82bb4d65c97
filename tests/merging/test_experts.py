"""Fine-tunes whose MLPs become the experts of one mixture."""

import json

import numpy as np
import pytest

from lowrank import pretrained
from lowrank.core.errors import UserError
from lowrank.merging import combine as combining
from lowrank.merging.combine import combine, plan
from lowrank.models import build_model
from tests.support.close import assert_close
from tests.support.dense_families import dense, tuned
from tests.support.merged_models import edit_config, merged, recipe, tensors

TOKENS = np.array([[3, 8, 9, 7, 12, 6, 20]])
GATE = "model.layers.{}.block_sparse_moe.gate.weight"
PROMPTS = {"a": ["the cat sat", "red sun"], "b": ["who ran ?"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tuned(tmp_path_factory.mktemp("models"), "llama")


def listed(names="ab", **more):
    return [{"source_model": n, "positive_prompts": PROMPTS[n], **more} for n in names]


def logits(folder):
    model = pretrained.load(str(folder))
    return np.asarray(build_model(model.config).apply({"params": model.params}, TOKENS))


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.all) for f in ("qwen2", "qwen3"))])
def test_equal_experts_compute_what_the_dense_model_does(family, tmp_path):
    models = {"base": dense(tmp_path / "base", family)}
    experts = [{"source_model": "base"}] * 3
    combine(recipe(models, base_model="base", gate_mode="random", experts=experts), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["model_type"] == {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}[family]
    assert_close(logits(tmp_path / "m"), logits(models["base"]), relative=2e-5, size=1)


def test_experts_are_the_models_mlps_and_the_rest_is_their_mean(models, tmp_path):
    result = merged(models, tmp_path / "m", base_model="base", gate_mode="cheap_embed", experts=listed())
    a, b, base = (tensors(models[n]) for n in ("a", "b", "base"))
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for e, source in enumerate((a, b)):
        for theirs, ours in names.items():
            kept = result[f"model.layers.1.block_sparse_moe.experts.{e}.{theirs}.weight"]
            np.testing.assert_array_equal(kept, source[f"model.layers.1.mlp.{ours}.weight"])
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight", "lm_head.weight"):
        assert_close(result[name], (np.float64(a[name]) + b[name]) / 2)
    ids = pretrained.load(str(models["base"])).tokenizer.encode
    table = np.float64(base["model.embed_tokens.weight"])
    rows = np.array([table[[i for text in PROMPTS[n] for i in ids(text)]].sum(0) for n in "ab"])
    for layer in range(3):
        assert_close(result[GATE.format(layer)], rows / np.linalg.norm(rows, axis=1, keepdims=True), relative=1e-6)
    rows = (tmp_path / "m/merge_report.csv").read_text().splitlines()
    assert len(rows) == 1 + len(result)


def test_any_rule_may_merge_the_rest_and_passthrough_takes_the_base(models, tmp_path):
    keys = {"base_model": "base", "gate_mode": "random", "experts": listed()}
    q, base = "model.layers.0.self_attn.q_proj.weight", tensors(models["base"])
    kept = merged(models, tmp_path / "kept", merge_method="passthrough", **keys)
    np.testing.assert_array_equal(kept[q], base[q])
    ties = merged(models, tmp_path / "ties", merge_method="ties", parameters={"weight": 1, "density": 0.5}, **keys)
    alone = {"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}, "base_model": "base"}
    dense_ties = merged(models, tmp_path / "dense", models=[{"model": "a"}, {"model": "b"}], **alone)
    np.testing.assert_array_equal(ties[q], dense_ties[q])
    gates = [tensors(tmp_path / n)[GATE.format(i)] for n in ("kept", "ties") for i in range(2)]
    np.testing.assert_array_equal(gates[0], gates[2])  # of one seed
    assert not np.array_equal(gates[0], gates[1])


def test_the_shared_expert_of_a_qwen_mixture(tmp_path):
    models = tuned(tmp_path, "qwen2")
    keys = {"base_model": "base", "gate_mode": "uniform_random", "experts": listed(), "experts_per_token": 1}
    shared = merged(models, tmp_path / "m", shared_experts=[{"source_model": "base", "residual_scale": 0.5}], **keys)
    down = tensors(models["base"])["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(shared["model.layers.0.mlp.shared_expert.down_proj.weight"], 0.5 * down)
    gates = np.concatenate([shared[f"model.layers.0.mlp.{n}.weight"] for n in ("gate", "shared_expert_gate")])
    assert gates.shape == (3, 16)
    assert 0.15 < np.abs(gates).max() <= 0.25  # 1 / sqrt(16)
    pretrained.load(str(tmp_path / "m"))
    merged(models, tmp_path / "n", **keys)
    assert json.loads((tmp_path / "n/config.json").read_text())["shared_expert_intermediate_size"] == 1


BAD = {
    "a key without experts": (
        {"models": [{"model": "a"}], "merge_method": "uniform_soup"},
        "gate_mode is for a mixture",
    ),
    "no prompts": ({"experts": [{"source_model": "a"}] * 2}, "gate_mode=hidden needs positive_prompts"),
    "equal prompts": (
        {"experts": [{"source_model": n, "positive_prompts": ["sun"]} for n in "ab"]},
        "the 2 experts have the same prompts",
    ),
    "a gate": ({"experts": listed(), "gate_mode": "hiden"}, r"unknown gate_mode.*did you mean 'hidden'"),
    "too many per token": ({"experts": listed(), "experts_per_token": 3}, r"experts_per_token=3 is not in 1\.\.2"),
    "no base": ({"experts": listed(), "base_model": None}, "a mixture needs a base_model"),
    "two shared": ({"experts": listed(), "shared_experts": listed()}, "one shared expert, and shared_experts lists 2"),
    "a layout": ({"experts": listed(), "architecture": "qwen3_moe"}, "unknown architecture for a llama: 'qwen3_moe'"),
    "an unknown layout": ({"experts": listed(), "architecture": "deepseek"}, "unknown architecture in"),
    "noise": ({"experts": listed(noise_scale=0.1)}, "the key 'noise_scale' is not supported"),
    "a rule that selects": ({"experts": listed(), "merge_method": "greedy_soup"}, "greedy_soup cannot merge what"),
    "an expert without a model": ({"experts": [{"positive_prompts": ["sun"]}]}, "an entry of experts has no source"),
    "a long prompt": (
        {"experts": [*listed("a"), {"source_model": "b", "positive_prompts": ["the " * 80]}]},
        r"a prompt has 80 tokens, more than the 64 positions",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_mixtures_are_refused_before_a_tensor_is_read(case, models, tmp_path, monkeypatch):
    keys, message = BAD[case]
    monkeypatch.setattr(combining.Checkpoint, "read", lambda *args: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=message):
        combine(recipe(models, **({"base_model": "base", "gate_mode": "hidden"} | keys)), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_no_experts(tmp_path):
    models = tuned(tmp_path, "llama")
    keys = {"base_model": "base", "gate_mode": "random", "experts": listed()}
    for name in models:
        edit_config(models[name], attention_bias=True)
    with pytest.raises(UserError, match=r"base has .*bias=True, which the config of a mixtral cannot hold"):
        plan(recipe(models, **keys))
    for name in models:
        edit_config(models[name], attention_bias=False, model_type="olmo2")
    with pytest.raises(UserError, match="is a olmo2, of which a mixture has no layout; known: mixtral"):
        plan(recipe(models, **keys))
