"""Adapters that a run trains further: their method, their leaves on the base, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, load, saved_adapter
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import merge
from lowrank.pretrained.fingerprint import fingerprint
from lowrank.training import build
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.close import assert_close
from tests.support.thinning import keep
from tests.support.tiny_runs import config_of

Q = ".*attn/q/kernel"
GROUPS = {
    "lora": {"name": "lora", "rank": 2, "target": Q, "alpha": 6.0, "rank_pattern": {"layers/1/.*": 0}},
    "dora": {"name": "dora", "rank": 2, "target": Q, "bias": "all"},
    "pissa": {"name": "lora", "rank": 2, "target": Q, "init": "pissa"},
    "olora": {"name": "lora", "rank": 2, "target": Q, "init": "olora"},
    "lora_xs": {"name": "lora_xs", "rank": 2, "target": Q},
    "ia3": {"name": "ia3"},
    "loftq": {"name": "loftq", "rank": 2, "target": Q},
    "vera": {"name": "vera", "rank": 4, "target": Q},
    "oft": {"name": "oft", "block": 4, "target": Q},
    "bitfit": {"name": "bitfit"},
    "tokens": {"name": "lora", "rank": 2, "target": Q, "also_tokens": [3, 7]},
}


def saved(base, group, folder):
    """`(parameters as a run trains them, mask)` of an adapter that is written into the folder."""
    params, names = adapted(base.params, group, size=0.1) if group["name"] != "vera" else unbound(base.params, group)
    mask = tree.map_named(lambda name, _: name in names, params)
    method = methods.build_method(group)
    original = base.params if group.get("init") in ("pissa", "olora") else None
    exported, exported_mask = methods.exported_leaves(method, params, mask)
    options = {"mask": exported_mask, "method": group, "original": original, "exact": (params, mask)}
    adapter_files.save(exported, base, folder, base_hash=fingerprint(str(base.folders[0])), **options)
    return params, mask


def unbound(params, group):
    method = methods.build_method(group)
    start = methods.attach(method, params, jax.random.key(1))
    mask = methods.trainable_mask(method, start)
    moved = jax.tree.map(lambda x, learns: x + 0.1 if learns else x, start, mask)
    return moved, [name for name, learns in tree.named_leaves(mask) if learns]


@pytest.mark.parametrize("name", keep(GROUPS, ["lora"]))
def test_the_leaves_of_a_run_come_back_as_they_were(name, files, tmp_path):
    base, group = pretrained.load(str(files / "llama")), GROUPS[name]
    trained, mask = saved(base, group, tmp_path)
    found = saved_adapter.read_adapter(tmp_path, str(files / "llama"))
    assert json.loads(json.dumps(group)) == found.method
    start = methods.attach(methods.build_method(found.method), base.params, jax.random.key(1))
    again = saved_adapter.carried(found, base.params, start, mask)
    assert tree.leaf_names(again) == tree.leaf_names(trained)
    for (leaf, ours), (_, theirs) in zip(tree.named_leaves(again), tree.named_leaves(trained), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), leaf


PATH = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"


def foreign(folder, rank=2, layers=(0, 2), **changes):
    """An adapter as peft writes it, on q and v of the tiny Llama's layers; returns its tensors."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": "llama"}
    config |= {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": list(layers), "lora_dropout": 0.25}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    rng, sizes = np.random.default_rng(0), {"q": 16, "v": 8}
    arrays = {}
    for i in layers:
        for module, out in sizes.items():
            arrays[PATH.format(i, module, "A")] = rng.standard_normal((rank, 16)).astype(np.float32)
            arrays[PATH.format(i, module, "B")] = rng.standard_normal((out, rank)).astype(np.float32)
    save_file(arrays, folder / "adapter_model.safetensors")
    return arrays


def start_of(files, folder, arg="rank=2", **changes):
    """`(run, adapted parameters)` of a run that trains the adapter in the folder further."""
    config = config_of(files, arg, mesh__data=1, model__adapter=str(folder))
    config.method = changes.pop("method", {})
    config.update(changes)
    run = build.build_run(config)
    return run, run.start_params(run.load().params)[0]


@pytest.mark.parametrize("init", [pytest.param(True, marks=pytest.mark.all), "pissa"])
def test_the_adapter_of_another_tool_says_its_method_and_its_function_is_kept(init, files, tmp_path):
    arrays = foreign(tmp_path / "a", init_lora_weights=init)
    run, params = start_of(files, tmp_path / "a")
    group = {"target": r"(layers/attn/q|layers/attn/v)/kernel", "rank": 2, "alpha": 6, "dropout": 0.25}
    group |= {"rank_pattern": {"layers/1/attn/q/kernel": 0, "layers/1/attn/v/kernel": 0}}
    assert run.config.method == {"name": "lora", **group} | ({"init": "pissa"} if init == "pissa" else {})
    form = params["layers"]["attn"]["q"]["kernel"]
    assert np.array_equal(form.a[2].T, arrays[PATH.format(2, "q", "A")])
    assert np.array_equal(form.b[0].T, arrays[PATH.format(0, "q", "B")])
    theirs = merge(load.load_adapted(tmp_path / "a", str(files / "llama")).params)
    for ours, other in zip(jax.tree.leaves(merge(params)), jax.tree.leaves(theirs), strict=True):
        assert_close(ours, other, relative=1e-5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"name": "dora"},
            "method.name=dora in the config, and the adapter in .*a is of lora: leave it out, as",
        ),
        ({"name": "lora", "rank": 3}, "method.rank=3 in the config, and the adapter in .*a has 2: leave it out"),
        ({"alpha": 16.0}, "method.alpha=16.0 in the config, and the adapter in .*a has 6: leave it out"),
        ({"rnak": 2}, r"unknown config key 'method.rnak' \(did you mean 'method.rank'\?\)"),
        ({"target": Q}, "layers/attn/v/kernel/base is absent by the run's method, and .3, 16, 8. in the adapter in"),
    ],
)
def test_another_method_or_setting_is_one_line_with_both(given, text, files, tmp_path, monkeypatch):
    foreign(tmp_path / "a", layers=(0, 1, 2))
    monkeypatch.setattr(build.Run, "load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=text):
        start_of(files, tmp_path / "a", method=given)


@pytest.mark.all
def test_a_pattern_that_matches_the_same_weights_agrees(files, tmp_path):
    foreign(tmp_path / "a", layers=(0, 1, 2))
    run, _ = start_of(files, tmp_path / "a", method={"target": ".*attn/(q|v)/kernel"})
    assert run.config.method["target"] == ".*attn/(q|v)/kernel"


@pytest.mark.parametrize("init", ["loftq", "pissa_niter_4"])
def test_an_init_that_changed_the_base_is_refused_with_what_to_do(init, files, tmp_path):
    foreign(tmp_path / "a", init_lora_weights=init)
    with pytest.raises(UserError, match=r"which changed its base: .*save that base and its tokenizer in residual_base"):
        start_of(files, tmp_path / "a")


def test_biases_of_some_layers_alone_are_refused(files, tmp_path):
    foreign(tmp_path / "a", bias="lora_only")
    with pytest.raises(
        UserError, match=r"trains the biases of some layers alone, and a run those of all: set model.st"
    ):
        start_of(files, tmp_path / "a")


def test_a_base_with_other_weights_is_refused_by_its_hash(files, tmp_path):
    base = pretrained.load(str(files / "llama"))
    saved(base, GROUPS["lora"], tmp_path / "a")
    other = tiny.llama(tmp_path / "llama")
    pretrained.export(jax.tree.map(lambda x: x * 1.001, base.params), base, tmp_path / "new" / "llama")
    saved_adapter.read_adapter(tmp_path / "a", str(other))  # the same weights, in another place
    with pytest.raises(UserError, match=r"whose weights are not those of .*: their hashes differ"):
        saved_adapter.read_adapter(tmp_path / "a", str(tmp_path / "new" / "llama"))
    foreign(tmp_path / "b", base_model_name_or_path=str(tmp_path / "new" / "llama"))
    with pytest.raises(UserError, match="their hashes differ"):
        saved_adapter.read_adapter(tmp_path / "b", str(other))
    foreign(tmp_path / "c", base_model_name_or_path="bert")
    with pytest.raises(UserError, match="is for base 'bert', the loaded base is 'llama'"):
        saved_adapter.read_adapter(tmp_path / "c", str(other))


def test_what_a_method_would_not_train_is_not_dropped(files, tmp_path):
    config = {"peft_type": "IA3", "target_modules": ["q_proj", "v_proj"], "feedforward_modules": []}
    config |= {"modules_to_save": ["lm_head"], "base_model_name_or_path": "llama"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.{}.self_attn.{}_proj.ia3_l"
    arrays = {name.format(i, m): np.full((n, 1), 1.5, np.float32) for i in range(3) for m, n in (("q", 16), ("v", 8))}
    arrays["base_model.model.lm_head.weight"] = np.ones((len(tiny.vocabulary()), 16), np.float32)
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    text = r"the adapter in .* changes head/kernel, which the run's method does not train: add it to method.also_train"
    with pytest.raises(UserError, match=text):
        start_of(files, tmp_path, method={"name": "ia3", "target": ".*attn/(q|v)/kernel", "feedforward": ""})


def test_a_merge_needs_an_adapter_and_one_that_a_base_can_hold(files, tmp_path):
    with pytest.raises(UserError, match=r"model.start=merge needs an adapter: name its folder or hub id in model.adap"):
        build.build_run(config_of(files, model__start="merge"))
    with pytest.raises(UserError, match=r"unknown model.start 'marge' \(did you mean 'merge'\?\)"):
        build.build_run(config_of(files, model__start="marge"))
    base = pretrained.load(str(files / "llama"), model={"num_prompt": 3})
    base = dataclasses.replace(base, new=())
    mask = tree.map_named(lambda name, _: name.startswith("prompt"), base.params)
    adapter_files.save(base.params, base, tmp_path, mask=mask, method={"name": "prompt", "length": 3})
    with pytest.raises(UserError, match=r"has model.num_prompt=3, which no base can hold: leave model.start out"):
        build.build_run(config_of(files, model__adapter=str(tmp_path), model__start="merge"))
