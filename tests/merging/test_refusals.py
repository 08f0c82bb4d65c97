"""Recipes and models that are refused, each before a tensor is read."""

import shutil
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowrank.core.errors import UserError
from lowrank.merging import combine as combining
from lowrank.merging.combine import combine, plan
from tests.support.merged_models import edit_config, family, recipe, tensors

Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three fine-tunes. Not to be changed."""
    return family(tmp_path_factory.mktemp("models"))


def entries(names="abc", **own):
    return [{"model": n, "parameters": {k: v[i] for k, v in own.items()}} for i, n in enumerate(names)]


def copied(models, tmp_path, name="a"):
    folder = tmp_path / "changed"
    shutil.copytree(models[name], folder)
    return folder, {**models, "x": folder}


BAD = {
    "weights that sum to zero": ({"merge_method": "linear", "models": entries("ab", weight=[0.0, 0.0])}, "sum to zero"),
    "a negative weight": (
        {"merge_method": "linear", "models": entries("ab", weight=[2.0, -1.0])},
        r"weight=-1.0 is negative.*\(for model.embed_tokens.weight\)",
    ),
    "a density": (
        {"merge_method": "ties", "base_model": "base", "models": entries("ab", weight=[1, 1], density=[0.5, 1.5])},
        r"density=1.5 is outside of \(0, 1\]",
    ),
    "a filter": (
        {
            "merge_method": "slerp",
            "models": entries("ab"),
            "parameters": {"t": [{"filter": "self_atn", "value": 1}, {"value": 0}]},
        },
        r"filter 'self_atn' of t matches no tensor \(did you mean 'self_attn'\?\)",
    ),
    "a missing parameter": ({"merge_method": "linear", "models": entries("ab")}, "parameter 'weight' has no value"),
    "an unknown parameter": (
        {"merge_method": "linear", "models": entries("ab"), "parameters": {"wieght": 1}},
        r"unknown parameter of linear: 'wieght' \(did you mean 'weight'\?\)",
    ),
    "an unknown method": (
        {"merge_method": "arcee_fusion", "models": entries("ab")},
        "unknown merge_method.*'arcee_fusion'",
    ),
    "a missing base": ({"merge_method": "ties", "models": entries("ab")}, "give base_model"),
    "a base beside a mean": (
        {"merge_method": "linear", "base_model": "base", "models": entries("ab", weight=[1, 1])},
        "linear has no base: list",
    ),
    "three models": (
        {"merge_method": "slerp", "models": entries("abc"), "parameters": {"t": 0.5}},
        "exactly 2 of them",
    ),
    "a key of mergekit": (
        {"merge_method": "linear", "models": entries("ab"), "tokenizer": {"source": "union", "tokens": {}}},
        r"the key 'tokens' is not supported",
    ),
    "a range": (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 5]}]}]},
        r"layer_range=\[0, 5\] of .* ends beyond its 3 layers",
    ),
    "unequal ranges": (
        {
            "merge_method": "slerp",
            "parameters": {"t": 0.5},
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}]}],
        },
        "differ in their number of layers",
    ),
    "no statistics": ({"merge_method": "fisher", "models": entries("ab")}, "fisher needs the statistics of"),
    "no score": ({"merge_method": "greedy_soup", "models": entries("ab")}, "greedy_soup needs a held-out score"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_are_refused_before_a_tensor_is_read(case, models, tmp_path, monkeypatch):
    keys, message = BAD[case]
    monkeypatch.setattr(combining.Checkpoint, "read", lambda *args: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=message):
        combine(recipe(models, **keys), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_together(models, tmp_path):
    folder, models = copied(models, tmp_path)
    given = {"merge_method": "linear", "models": entries("ax", weight=[1, 1])}
    edit_config(folder, model_type="mistral")
    with pytest.raises(UserError, match=r"is a llama and .* a mistral: their architectures differ"):
        plan(recipe(models, **given))
    edit_config(folder, model_type="llama", tie_word_embeddings=True)
    with pytest.raises(UserError, match="has a head of its own"):
        plan(recipe(models, **given))
    edit_config(folder, tie_word_embeddings=False)
    arrays = tensors(folder)
    save_file({k: v for k, v in arrays.items() if k != Q.format(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"changed lacks the tensor 'self_attn.q_proj.weight' in layer 1"):
        plan(recipe(models, **given))
    save_file(arrays | {Q.format(1): np.zeros((16, 8), np.float32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="so their shapes differ"):
        plan(recipe(models, **given))
    broken = arrays[Q.format(1)].copy()
    broken[3, 2] = np.nan
    save_file(arrays | {Q.format(1): broken}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"changed: model.layers.1.self_attn.q_proj.weight.* holds NaN"):
        combine(recipe(models, **given), tmp_path / "m")


def test_an_output_that_exists_and_a_disk_that_is_full(models, tmp_path, monkeypatch):
    given = recipe(models, merge_method="linear", models=entries("ab", weight=[1, 1]))
    (tmp_path / "m").mkdir()
    (tmp_path / "m/file").touch()
    with pytest.raises(UserError, match="m exists and is not an empty directory"):
        combine(given, tmp_path / "m")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs 0.00 GB, and its disk has 0.00 GB: free some space"):
        combine(given, tmp_path / "n")
