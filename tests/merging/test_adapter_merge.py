"""Adapters of one base merged into one adapter, or into the base, against dense float64 updates."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank import pretrained
from lowrank.adapters import load, peft
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import is_weight, materialize
from lowrank.merging.adapter_merge import combine_adapters, plan_adapters
from lowrank.merging.combine import combine
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.close import assert_close
from tests.support.merged_models import fine_tune, recipe, tensors

GROUPS = {
    "lora": {"name": "lora", "rank": 2, "alpha": 6.0},
    "rslora": {"name": "lora", "rank": 4, "alpha": 3.0, "rslora": True, "target": r".*attn/(q|o)/kernel"},
    "adalora": {"name": "adalora", "init_rank": 4, "target_rank": 2},
    "dora": {"name": "dora", "rank": 2},
    "ia3": {"name": "ia3"},
    "loha": {"name": "loha", "rank": 2},
    "oft": {"name": "oft", "block": 4},
    "vera": {"name": "vera", "rank": 4},
    "lokr": {"name": "lokr", "rank": 2},
}
FACTORED, DENSE = ("lora", "rslora"), ("dora", "ia3", "loha", "oft", "vera", "lokr")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """`{"base": ..., name of a group: BASE+ADAPTER}`."""
    folder = tmp_path_factory.mktemp("adapters")
    base = pretrained.load(str(tiny.llama(folder / "base")))
    found = {"base": folder / "base"}
    for name, group in GROUPS.items():
        params = adapted(base.params, group, size=0.1)[0]
        peft.save(params, base, folder / name, method=group)
        found[name] = f"{folder / 'base'}+{folder / name}"
    return found


def kernels(base, directory=None):
    """Every kernel, with the adapter in `directory`, as the package's own loader has it."""
    model = load.load_adapted(directory, str(base)) if directory else pretrained.load(str(base))
    named = tree.named_leaves(model.params, is_weight)
    return {n: np.float64(materialize(w)) for n, w in named if n.endswith("kernel")}


def updates(places, name):
    before, after = kernels(places["base"]), kernels(places["base"], places[name].partition("+")[2])
    return {n: after[n] - x for n, x in before.items()}


def listed(weights):
    return [{"model": name, "parameters": {"weight": w}} for name, w in weights.items()]


def merge(places, output, weights, **keys):
    given = recipe(places, merge_method=keys.pop("merge_method", "linear"), models=listed(weights), **keys)
    return combine_adapters(given, output)


def test_a_linear_merge_in_factor_space_is_exact(places, tmp_path):
    weights = {"lora": 0.6, "rslora": -0.4}
    report = merge(places, tmp_path / "m", weights, adapter={}, parameters={"normalize": False})
    expected = [updates(places, name) for name in weights]
    after = kernels(places["base"], tmp_path / "m")
    for name, x in kernels(places["base"]).items():
        total = sum(w * u[name] for w, u in zip(weights.values(), expected, strict=True))
        assert_close(after[name] - x, total, size=1)
    config = json.loads((tmp_path / "m/adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert (config["r"], config["lora_alpha"]) in [(6, 6), (2, 2), (4, 4)]
    assert report["worst"] == 0


def test_a_smaller_rank_says_what_it_loses(places, tmp_path):
    report = merge(places, tmp_path / "m", {"lora": 0.5, "rslora": 0.5}, adapter={"rank": 3})
    exact = [updates(places, name) for name in ("lora", "rslora")]
    before, after = kernels(places["base"]), kernels(places["base"], tmp_path / "m")
    total = 0.5 * (exact[0]["layers/attn/q/kernel"][1] + exact[1]["layers/attn/q/kernel"][1])
    lost = after["layers/attn/q/kernel"][1] - before["layers/attn/q/kernel"][1] - total
    error = report["relative_error"]["model.layers.1.self_attn.q_proj"]
    assert 0 < error < 1
    assert_close(np.linalg.norm(lost) / np.linalg.norm(total), error, relative=1e-4)
    assert max(report["ranks"].values()) == 3


@pytest.mark.parametrize("name", [*DENSE, "adalora"])
def test_every_form_is_merged_by_its_true_update(name, places, tmp_path):
    given = recipe(places, merge_method="task_arithmetic", base_model="base", models=listed({name: 0.5}))
    combine(given, tmp_path / "m")
    change = tensors(tmp_path / "m")[Q] - tensors(places["base"])[Q]
    expected = 0.5 * updates(places, name)["layers/attn/q/kernel"][1].T
    assert_close(change, expected, relative=2e-5, size=max(1.0, np.abs(expected).max()))


def test_a_rule_that_is_not_linear_acts_on_dense_updates(places, tmp_path):
    weights, keys = {"lora": 1.0, "dora": 1.0}, {"base_model": "base", "parameters": {"density": 0.5}}
    report = merge(places, tmp_path / "m", weights, merge_method="ties", adapter={"rank": 16}, **keys)
    assert report["worst"] < 1e-6
    combine(recipe(places, merge_method="ties", models=listed(weights), **keys), tmp_path / "full")
    change = kernels(tmp_path / "full")["layers/attn/q/kernel"] - kernels(places["base"])["layers/attn/q/kernel"]
    before, after = kernels(places["base"]), kernels(places["base"], tmp_path / "m")
    assert_close(after["layers/attn/q/kernel"] - before["layers/attn/q/kernel"], change, relative=2e-5, size=1)


def test_subtracting_an_adapter_restores_the_base(places, tmp_path):
    add = recipe(places, merge_method="linear", models=listed({"lora": 1.0}))
    combine(add, tmp_path / "with")
    again = {**places, "merged": tmp_path / "with"}
    lora = [{"model": "lora", "parameters": {"weight": -1.0}}, {"model": "merged", "parameters": {"weight": 1.0}}]
    combine(recipe(again, merge_method="task_arithmetic", base_model="base", models=lora), tmp_path / "back")
    for name, x in tensors(places["base"]).items():
        np.testing.assert_array_equal(tensors(tmp_path / "back")[name], x)
    report = merge(places, tmp_path / "none", {"lora": 1.0, "rslora": 0.0}, adapter={})
    assert report["worst"] == 0


def test_adapters_of_other_bases_are_refused_by_their_hash(places, tmp_path):
    other = fine_tune(places["base"], tmp_path / "base", 7)
    adapter = places["rslora"].partition("+")[2]
    models = [{"model": places["lora"], "parameters": {"weight": 1.0}}]
    models += [{"model": f"{other}+{adapter}", "parameters": {"weight": 1.0}}]
    with pytest.raises(UserError, match="have different weights: adapters of one base merge"):
        plan_adapters(recipe({}, merge_method="linear", adapter={}, models=models))
    same = tmp_path / "copy/base"
    same.mkdir(parents=True)
    for path in places["base"].iterdir():
        (same / path.name).write_bytes(path.read_bytes())
    models[1]["model"] = f"{same}+{adapter}"
    plan_adapters(recipe({}, merge_method="linear", adapter={}, models=models))


def test_an_output_that_exists_a_full_disk_and_a_broken_adapter(places, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/file").touch()
    with pytest.raises(UserError, match="m exists and is not an empty directory"):
        merge(places, tmp_path / "m", {"lora": 1.0}, adapter={})
    weight = [{"filter": "q_prj", "value": 1.0}, {"value": 1.0}]
    with pytest.raises(UserError, match=r"the filter 'q_prj' of weight matches no tensor \(did you mean 'q_proj'"):
        merge(places, tmp_path / "n", {"lora": 1.0}, adapter={}, parameters={"weight": weight})
    source = tmp_path / "broken"
    shutil.copytree(places["lora"].partition("+")[2], source)
    broken = {**places, "x": f"{places['base']}+{source}"}
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_prj"]}))
    with pytest.raises(UserError, match=r"target_modules \['q_prj'\] match no module"):
        merge(broken, tmp_path / "n", {"x": 1.0}, adapter={})
    (source / "adapter_config.json").write_text(json.dumps(config))
    arrays = load_file(source / "adapter_model.safetensors")
    next(iter(arrays.values()))[0, 0] = np.nan
    save_file(arrays, source / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinite values: the adapter is broken"):
        merge(broken, tmp_path / "n", {"x": 1.0}, adapter={})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"n will take .* bytes, and its disk has 1000 left"):
        merge(places, tmp_path / "n", {"lora": 1.0}, adapter={})
    assert not (tmp_path / "n").exists()


def test_what_a_merge_of_updates_cannot_carry(places, tmp_path):
    with pytest.raises(UserError, match="of these adapters has full rank: give adapter"):
        merge(places, tmp_path / "m", {"lora": 1.0, "dora": 1.0}, adapter={})
    with pytest.raises(UserError, match=r"base is not of the form BASE\+ADAPTER"):
        merge(places, tmp_path / "m", {"lora": 1.0, "base": 1.0}, adapter={})
    source = tmp_path / "biased"
    source.mkdir()
    folder = Path(places["lora"].partition("+")[2])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_bytes((folder / name).read_bytes())
    config = json.loads((source / "adapter_config.json").read_text())
    for key, value, message in [
        ("modules_to_save", ["lm_head"], "has modules_to_save, which a merge of updates cannot carry"),
        ("bias", "all", "trains biases, which a merge of updates cannot carry"),
    ]:
        (source / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=message):
            merge({**places, "x": f"{places['base']}+{source}"}, tmp_path / "m", {"x": 1.0}, adapter={})
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("rank", [None, 2])
def test_regmean_of_adapters_is_that_of_their_models(places, tmp_path, rank):
    """The base cancels: the sum of the ranks holds the whole update, and a smaller rank its largest part."""
    listed, grams, kernels = [], [], []
    for seed, name in enumerate(FACTORED):
        rows = np.random.default_rng(seed).standard_normal((40, 16)).astype(np.float32)
        names = [key for key, x in tensors(places["base"]).items() if x.shape[-1] == 16 and x.ndim == 2]
        save_file(dict.fromkeys(names, rows.T @ rows), tmp_path / f"{name}.safetensors")
        listed.append({"model": places[name], "statistics": str(tmp_path / f"{name}.safetensors")})
        grams.append(np.float64(0.9 * rows.T @ rows + 0.1 * np.diag(np.diag(rows.T @ rows))))
        combine(recipe({}, merge_method="passthrough", models=[{"model": places[name]}]), tmp_path / name)
        kernels.append(np.float64(tensors(tmp_path / name)[Q]))
    group = {"rank": rank} if rank else {}
    keys = {"merge_method": "regmean", "models": listed, "adapter": group}
    combine_adapters(recipe({}, **keys), tmp_path / "merged")
    found = load_file(tmp_path / "merged/adapter_model.safetensors")
    a, b = (np.float64(found[f"base_model.model.{Q.removesuffix('.weight')}.lora_{part}.weight"]) for part in "AB")
    exact = np.linalg.solve(sum(grams), sum(g @ k.T for g, k in zip(grams, kernels, strict=True))).T
    exact -= np.float64(tensors(places["base"])[Q])
    if rank:
        u, s, v = np.linalg.svd(exact)
        exact = u[:, :rank] * s[:rank] @ v[:rank]
    assert a.shape[0] == (rank or 6)
    assert_close(b @ a, exact, relative=1e-4)
