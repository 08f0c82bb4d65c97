"""Adapters of the token embedding are merged as those of kernels; a head that is the embedding does not move unseen."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank import pretrained
from lowrank.adapters import load, peft
from lowrank.core.errors import UserError
from lowrank.merging.adapter_merge import combine_adapters
from lowrank.merging.combine import combine
from tests.support import checkpoint_files as files
from tests.support.adapted_model import adapted
from tests.support.close import assert_close
from tests.support.merged_models import recipe, tensors

TABLE, TARGET = "model.embed_tokens", r"embed/embedding|.*attn/q/kernel"
GROUPS = {
    "a": {"name": "lora", "rank": 2, "alpha": 6.0, "target": TARGET},
    "b": {"name": "lora", "rank": 3, "alpha": 6.0, "target": TARGET},
    "dora": {"name": "dora", "rank": 2, "target": TARGET},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def places(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    config = {**files.LLAMA, "tie_word_embeddings": request.param, "architectures": ["LlamaForCausalLM"]}
    base = pretrained.load(str(files.directory(folder / "base", config)))
    found = {"base": folder / "base"}
    for name, group in GROUPS.items():
        if not (request.param and name == "dora"):
            untied = {**adapted(base.params, group, size=0.1)[0]}
            peft.save(untied, base, folder / name, method=group)
            config = json.loads((folder / name / "adapter_config.json").read_text())
            if request.param:  # as PEFT writes it by default: the head keeps the base's values
                arrays = load_file(folder / name / "adapter_model.safetensors")
                peft.tensors.write_tensors(folder / name, {k: x for k, x in arrays.items() if "lm_head" not in k})
                config = {k: v for k, v in config.items() if k != "ensure_weight_tying"}
                config["target_modules"] = [m for m in config["target_modules"] if m != "lm_head"]
                (folder / name / "adapter_config.json").write_text(json.dumps(config))
            found[name] = f"{folder / 'base'}+{folder / name}"
    return found


def delta(places, name):
    """The update of the embedding `[V, D]` from the two tensors of the file, as PEFT's Embedding layer has it."""
    folder = places[name].partition("+")[2]
    found, config = load_file(f"{folder}/adapter_model.safetensors"), peft.config.parse_json(folder)
    a, b = (np.float64(found[f"base_model.model.{TABLE}.lora_embedding_{part}"]) for part in "AB")
    return config["lora_alpha"] / len(a) * (b @ a).T


def models(weights):
    return [{"model": name, "parameters": {"weight": w}} for name, w in weights.items()]


def test_a_linear_merge_is_exact(places, tmp_path):
    keys = {"merge_method": "linear", "adapter": {}, "parameters": {"normalize": False}}
    combine_adapters(recipe(places, models=models({"a": 0.6, "b": -0.4}), **keys), tmp_path / "m")
    assert json.loads((tmp_path / "m/adapter_config.json").read_text())["fan_in_fan_out"] is False
    found = load.load_adapted(tmp_path / "m", str(places["base"]))
    base = tensors(places["base"])
    expected = base[f"{TABLE}.weight"] + 0.6 * delta(places, "a") - 0.4 * delta(places, "b")
    table = found.params["embed"]["embedding"]
    assert_close(np.asarray(table.materialize()), expected, relative=1e-5)
    head = base.get("lm_head.weight", base[f"{TABLE}.weight"])
    np.testing.assert_array_equal(found.params["head"]["kernel"].T, head)


def test_into_a_whole_model(places, tmp_path):
    if "dora" not in places:
        with pytest.raises(
            UserError, match=r"adapts model\.embed_tokens and not the head .* merge it by launch\.merge"
        ):
            combine(recipe(places, merge_method="linear", models=models({"a": 1.0})), tmp_path / "m")
        return
    for name in ("a", "dora"):
        combine(recipe(places, merge_method="linear", models=models({name: 1.0})), tmp_path / name)
        found = load.load_adapted(places[name].partition("+")[2], str(places["base"]))
        live = np.asarray(found.params["embed"]["embedding"].materialize())
        assert_close(tensors(tmp_path / name)[f"{TABLE}.weight"], live, relative=1e-5)


def test_a_head_that_is_adapted_as_its_embedding_is_refused(places, tmp_path):
    folder = tmp_path / "tying"
    folder.mkdir()
    for path in map(
        type(folder)(places["a"].partition("+")[2]).joinpath, ("adapter_config.json", "adapter_model.safetensors")
    ):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": True}))
    given = recipe(
        {**places, "a": f"{places['base']}+{folder}"}, merge_method="linear", adapter={}, models=models({"a": 1})
    )
    if "dora" in places:
        combine_adapters(given, tmp_path / "m")
        return
    with pytest.raises(UserError, match=r"adapts the head of .* as its embedding"):
        combine_adapters(given, tmp_path / "m")
