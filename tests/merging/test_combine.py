"""Merges of tiny models from a recipe to a folder."""

import csv
import importlib
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank import pretrained
from lowrank.core.errors import UserError
from lowrank.merging import combine as combining
from lowrank.merging.combine import combine, plan
from lowrank.merging.rules import RULES
from tests.support.close import assert_close
from tests.support.merged_models import BFLOAT16, family, fine_tune, merged, recipe, tensors

Q = "model.layers.{}.self_attn.q_proj.weight"
MLP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three fine-tunes. Not to be changed."""
    return family(tmp_path_factory.mktemp("models"))


def entries(names="abc", **own):
    return [{"model": n, "parameters": {k: v[i] for k, v in own.items()}} for i, n in enumerate(names)]


def mean(models, weights):
    found = [tensors(models[n]) for n in weights]
    total = sum(weights.values())
    return {
        k: sum(w * np.float64(x[k]) for w, x in zip(weights.values(), found, strict=True)) / total for k in found[0]
    }


def test_a_linear_merge_is_the_mean_rounded_once_and_loads(models, tmp_path):
    given = entries(weight=[0.5, 0.3, 0.4])
    result = merged(models, tmp_path / "m", merge_method="linear", models=given, out_dtype="bfloat16")
    for name, x in mean(models, {"a": 0.5, "b": 0.3, "c": 0.4}).items():
        np.testing.assert_array_equal(result[name], x.astype(np.float32).astype(BFLOAT16), err_msg=name)
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == "bfloat16"
    pretrained.load(str(tmp_path / "m"))


def test_a_template_of_the_recipe_is_the_only_one(models, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(models["a"], folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ old }}"}))
    given = recipe(
        models | {"a": folder},
        merge_method="linear",
        models=entries("ab", weight=[1.0, 1.0]),
        chat_template="{{ new }}",
    )
    combine(given, tmp_path / "m")
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ new }}"
    assert "chat_template" not in json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())


def test_filters_and_curves_over_the_layers(models, tmp_path):
    curve = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.25}]
    parameters = {"weight": curve}
    given = [{"model": "a", "parameters": parameters}]
    result = merged(models, tmp_path / "m", merge_method="task_arithmetic", base_model="base", models=given)
    base, a = tensors(models["base"]), tensors(models["a"])
    wanted = {Q.format(i): i / 2 for i in range(3)} | {MLP.format(i): 1 - i / 2 for i in range(3)}
    wanted |= {"model.norm.weight": 0.25, "lm_head.weight": 0.25}
    for name, w in wanted.items():
        assert_close(result[name], base[name] + w * (a[name] - base[name]))


def test_slices_stack_and_their_embeddings_and_heads_are_of_the_ends(models, tmp_path):
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "b", "layer_range": [1, 3]}]},
    ]
    result = merged(models, tmp_path / "m", merge_method="passthrough", slices=slices)
    a, b = tensors(models["a"]), tensors(models["b"])
    assert json.loads((tmp_path / "m/config.json").read_text())["num_hidden_layers"] == 4
    for i, (source, layer) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        np.testing.assert_array_equal(result[Q.format(i)], source[Q.format(layer)])
    np.testing.assert_array_equal(result["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    np.testing.assert_array_equal(result["model.norm.weight"], b["model.norm.weight"])
    pretrained.load(str(tmp_path / "m"))


def test_a_hybrid_merges_each_slice_by_a_rule_of_its_own(models, tmp_path):
    sources = [{"model": n, "layer_range": [0, 2]} for n in ("base", "a")]
    ties = {"merge_method": "ties", "base_model": "base", "sources": sources, "parameters": {"trim": "model"}}
    slices = [ties, {"sources": [{"model": "b", "layer_range": [1, 3], "parameters": {"scale": 0.5}}]}]
    keys = {"merge_method": "passthrough", "slices": slices, "parameters": {"weight": 1.0, "density": 0.3}}
    result = merged(models, tmp_path / "m", **keys)
    a, b, base = (tensors(models[n]) for n in ("a", "b", "base"))
    for i, layer in ((2, 1), (3, 2)):
        np.testing.assert_array_equal(result[Q.format(i)], 0.5 * b[Q.format(layer)])
    np.testing.assert_array_equal(result["lm_head.weight"], 0.5 * b["lm_head.weight"])
    names = [n for n in result if "embed" in n or n.startswith(("model.layers.0.", "model.layers.1."))]
    flat = {n: np.concatenate([x[k].reshape(-1) for k in names]) for n, x in (("r", result), ("a", a), ("base", base))}
    changed = flat["r"] != flat["base"]  # the largest of the tensors that ties merges, and of no other
    assert changed.sum() == int(0.3 * changed.size) + 1
    sizes = np.abs(flat["a"] - flat["base"])
    assert sizes[changed].min() >= sizes[~changed].max()
    with pytest.raises(UserError, match="unknown parameter of ties: 'scale'"):
        plan(recipe(models, **keys | {"slices": [ties | {"parameters": {"scale": 0.5}}, slices[1]]}))
    with pytest.raises(UserError, match="greedy_soup selects whole models"):
        recipe(models, **keys | {"slices": [ties | {"merge_method": "greedy_soup"}, slices[1]]})


def test_ties_of_the_paper_trims_over_the_whole_model(models, tmp_path):
    given = [{"model": n} for n in "abc"]
    options = {"merge_method": "ties", "base_model": "base", "models": given, "parameters": {"density": 0.3}}
    result = merged(models, tmp_path / "m", preset="paper", **options)
    base, deltas = tensors(models["base"]), []
    for n in "abc":
        flat = np.concatenate([(x - base[k]).reshape(-1) for k, x in sorted(tensors(models[n]).items())])
        order = np.sort(np.abs(flat))[::-1]
        deltas.append(np.where(np.abs(flat) >= order[int(0.3 * len(flat))], flat, 0))
    rows = np.float64(deltas)
    sign = np.sign(rows.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = np.sign(rows) == sign
    expected = (rows * agree).sum(0) / np.maximum(agree.sum(0), 1)
    flat = np.concatenate([(np.float64(x) - base[k]).reshape(-1) for k, x in sorted(result.items())])
    assert_close(flat, expected, relative=1e-5)


def test_the_report_measures_distances_conflicts_cosines_and_trimming(models, tmp_path):
    given = entries("ab", weight=[1.0, 0.5], density=[0.5, 0.2])
    options = {"merge_method": "ties", "base_model": "base", "models": given}
    summary = combine(recipe(models, **options), tmp_path / "m")
    arrays = {n: np.concatenate([x.reshape(-1) for _, x in sorted(tensors(models[n]).items())]) for n in models}
    result = np.concatenate([x.reshape(-1) for _, x in sorted(tensors(tmp_path / "m").items())])
    deltas = {n: np.float64(arrays[n]) - arrays["base"] for n in "ab"}
    for n in ("base", "a", "b"):
        distance = np.linalg.norm(result - arrays[n]) / np.linalg.norm(arrays[n])
        assert_close(summary["relative_distance"][str(models[n])], distance, relative=1e-5)
    cosine = np.vdot(deltas["a"], deltas["b"]) / np.linalg.norm(deltas["a"]) / np.linalg.norm(deltas["b"])
    assert_close(np.array(summary["cosines"]), np.array([[1, cosine], [cosine, 1]]), relative=1e-5)
    assert_close(summary["sign_conflicts"], np.mean(deltas["a"] * deltas["b"] < 0), relative=1e-6)
    assert_close(np.array(summary["share_trimmed"]), np.array([0.5, 0.8]), relative=0.01)
    rows = list(csv.DictReader((tmp_path / "m/merge_report.csv").read_text().splitlines()))
    assert len(rows) == len(tensors(models["a"]))
    assert (tmp_path / "m/task_vector_cosines.png").stat().st_size > 1000
    card = (tmp_path / "m/README.md").read_text()
    assert "merge_method: ties" in card
    assert str(models["b"]) in card


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Models with one large tensor of 2 MB in float32, which is stored in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "base").mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 4096, "architectures": ["LlamaForCausalLM"]}
    (folder / "base/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    shapes = {"model.embed_tokens.weight": (4096, 128), "lm_head.weight": (4096, 8), Q.format(0): (8, 8)}
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    save_file(arrays, folder / "base/model.safetensors")
    return {"base": folder / "base"} | {
        n: fine_tune(folder / "base", folder / n, i, 0.05, BFLOAT16) for i, n in enumerate("abc")
    }


FREE = [name for name, rule in RULES.items() if not (rule.select or rule.statistics)]  # of scores and statistics
WIDEST = ("ties", "breadcrumbs", "sce")  # of 5.2 to 5.5 times the largest tensor; the others take 2.1 to 4.2


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in WIDEST else pytest.mark.all) for m in FREE])
def test_memory_is_bounded_by_the_largest_tensor(method, large, tmp_path):
    importlib.import_module("matplotlib.figure")  # of the report's plot, which is no part of a merge's memory
    rule = RULES[method]
    count = min(3, rule.most or 3)
    given = {"weight": 1.0, "density": 0.6, "t": 0.3, "select_topk": 0.5}
    parameters = {name: value for name, value in given.items() if name in rule.options}
    based = {"base_model": "base"} if rule.base or rule.may_have_base else {}
    listed = [{"model": n} for n in "abc"[:count]]
    made = recipe(large, merge_method=method, models=listed, parameters=parameters, **based)
    tracemalloc.start()
    combine(made, tmp_path / method)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= (count + 3) * 4096 * 128 * 4


def test_a_merge_that_was_stopped_continues(models, tmp_path, monkeypatch):
    given = recipe(models, merge_method="linear", models=entries(weight=[1.0, 2.0, 3.0]))
    combine(given, tmp_path / "whole")
    real, calls = combining.merge_tensor, []

    def stops(merge, tensor, *rest):
        if len(calls) == 10:
            raise KeyboardInterrupt
        calls.append(tensor.name)
        real(merge, tensor, *rest)

    monkeypatch.setattr(combining, "merge_tensor", stops)
    with pytest.raises(KeyboardInterrupt):
        combine(given, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    seen = []
    monkeypatch.setattr(combining, "merge_tensor", lambda m, t, *rest: (seen.append(t.name), real(m, t, *rest)))
    combine(given, tmp_path / "m")
    assert len(seen) == len(tensors(models["a"])) - 10
    assert (tmp_path / "m/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "m/merge_report.json").read_text()) == json.loads(
        (tmp_path / "whole/merge_report.json").read_text()
    )
    assert [p.name for p in (tmp_path / "m").iterdir() if p.name.startswith(".")] == []


def test_shards_hold_what_one_file_holds(models, tmp_path):
    given = recipe(models, merge_method="linear", models=entries(weight=[1.0, 2.0, 3.0]))
    combine(given, tmp_path / "one")
    combine(given, tmp_path / "many", shard_bytes=8000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    shards = {}
    for file in set(index.values()):
        shards |= load_file(tmp_path / "many" / file)
    for name, x in tensors(tmp_path / "one").items():
        np.testing.assert_array_equal(shards[name], x)


def test_a_greedy_soup_is_selected_by_the_score_of_candidates(models, tmp_path):
    best = mean(models, {"a": 1, "c": 1})

    def score(folder):
        return -sum(np.linalg.norm(x - best[k]) for k, x in tensors(folder).items())

    given = recipe(models, merge_method="greedy_soup", models=[{"model": n} for n in "abc"])
    combine(given, tmp_path / "m", score=score)
    for name, x in tensors(tmp_path / "m").items():
        assert_close(x, best[name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_depth_up_scaling_stacks_a_model_on_itself(models, tmp_path):
    """SOLAR: n layers become 2 (n - m), 48 of 32 with m = 8."""
    n, m = 3, 1
    slices = [{"sources": [{"model": "a", "layer_range": span}]} for span in ([0, n - m], [m, n])]
    merge = plan(recipe(models, merge_method="passthrough", slices=slices))
    assert merge.hf_config["num_hidden_layers"] == 2 * (n - m)
    layers = [t.inputs[0].name for t in merge.tensors if t.name.endswith("q_proj.weight")]
    assert layers == [Q.format(i) for i in (0, 1, 1, 2)]


def statistics(models, folder, kind):
    """`{model: (file, arrays)}` of positive numbers, or of Gram matrices of the kernels' inputs."""
    found = {}
    for seed, name in enumerate("ab"):
        rng, arrays = np.random.default_rng(seed), {}
        for key, x in tensors(models[name]).items():
            if kind == "fisher":
                arrays[key] = rng.random(x.shape).astype(np.float32)
            elif x.ndim == 2 and "embed" not in key:
                rows = rng.standard_normal((40, x.shape[1])).astype(np.float32)
                arrays[key] = rows.T @ rows / 40
        save_file(arrays, folder / f"{name}.safetensors")
        found[name] = (str(folder / f"{name}.safetensors"), arrays)
    return found


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_rules_with_statistics(method, models, tmp_path):
    found = statistics(models, tmp_path, RULES[method].statistics)
    listed = [{"model": n, "statistics": found[n][0]} for n in "ab"]
    parameters = {"regmean": {"alpha": 1.0}}.get(method, {})
    result = merged(models, tmp_path / "m", merge_method=method, models=listed, parameters=parameters)
    a, b = (np.float64(tensors(models[n])[Q.format(0)]) for n in "ab")
    g, h = (np.float64(found[n][1][Q.format(0)]) for n in "ab")
    expected = (g * a + h * b) / (g + h) if method == "fisher" else np.linalg.solve(g + h, g @ a.T + h @ b.T).T
    assert_close(result[Q.format(0)], expected, relative=2e-5)
    if method != "fisher":
        bias = "model.layers.0.self_attn.q_proj.bias"
        assert_close(result[bias], (tensors(models["a"])[bias] + tensors(models["b"])[bias]) / 2)
    partial = {k: v for k, v in found["b"][1].items() if k != Q.format(0)}
    save_file(partial, tmp_path / "partial.safetensors")
    listed[1]["statistics"] = str(tmp_path / "partial.safetensors")
    with pytest.raises(UserError, match=r"partial.safetensors lacks .*model.layers.0.self_attn.q_proj.weight"):
        plan(recipe(models, merge_method=method, models=listed))
