"""A checkpoint in our codes is read back as it was, strictly."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank import pretrained, quantization
from lowrank.adapters import export as merging
from lowrank.adapters import load
from lowrank.core import sharding
from lowrank.core.errors import UserError
from lowrank.pretrained import export
from lowrank.training import loop
from tests.support import tiny_checkpoint as tiny
from tests.support.tiny_runs import config_of

GROUPS = {
    "nf4": {"block": 8, "double": True},
    "int8": {},
    "llm_int8": {"outliers": 2},
    "fp8": {},
    "int4": {"block": 8, "symmetric": False},
    "mixed": {"block": 16, "budget": 4.0, "target": "(layers|top)/mlp/.*kernel"},
}


def written(folder, name, model=tiny.llama):
    group = {"name": name, **GROUPS[name]}
    base = pretrained.load(str(model(folder / "plain")), quantized=group)
    return base, export(base.params, base, folder / "out", scheme=group)


@pytest.mark.parametrize("name", GROUPS)
def test_codes_come_back(name, tmp_path):
    base, out = written(tmp_path, name)
    again = pretrained.load(str(out))
    assert again.quantized["name"] == name
    assert jax.tree.structure(again.params) == jax.tree.structure(base.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, base.params)
    shapes = pretrained.describe(str(out))[2]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, again.params))


def test_shards_and_top_layers_of_codes_are_read(tmp_path):
    base, out = written(tmp_path, "nf4", tiny.bert)
    shared = pretrained.load(str(out), mesh=sharding.make_mesh(2, 2, 2)).params
    jax.tree.map(np.testing.assert_array_equal, shared, base.params)
    top = pretrained.load(str(out), model={"top_layers": 1}).params
    last = jax.tree.map(lambda x: x[-1:], base.params["layers"])
    jax.tree.map(np.testing.assert_array_equal, top["top"], last)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.scale"), rf"tensor '{Q}\.scale' is missing"),
        (lambda t: t.update(x=t[f"{Q}.scale"]), "tensor 'x' has no place"),
        (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][1:]}), rf"tensor '{Q}\.codes' has shape \(15, 16\)"),
        (lambda t: t.update({f"{Q}.codes": np.float32(t[f"{Q}.codes"])}), rf"tensor '{Q}\.codes' is F32, not I8"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    _, out = written(tmp_path, "int8")
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        pretrained.load(str(out))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"name": "nf5"}, r"unknown quantization scheme in .* 'nf5' \(did you mean 'nf4'\?\)"),
        ({"name": "nf4", "blok": 8}, r"out\.blok.*did you mean"),
        ({"name": "mixed"}, "no 'high'"),
        (4, "scheme must be an object, not 4"),
    ],
)
def test_an_unknown_scheme_is_named(scheme, message, tmp_path):
    _, out = written(tmp_path, "int8")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["scheme"] = scheme
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        pretrained.describe(str(out))


def test_codes_are_not_quantized_again(tmp_path):
    _, out = written(tmp_path, "int8")
    pretrained.describe(str(out), quantized="int8")  # what it is in: as an adapter of it records
    with pytest.raises(UserError, match="is in codes of int8 already"):
        pretrained.describe(str(out), quantized="nf4")


def test_the_command_writes_a_base_that_trains(files, tmp_path):
    command = [sys.executable, "-m", "launch.quantize", f"--model={files / 'llama'}", f"--output={tmp_path / 'base'}"]
    done = subprocess.run([*command, "--scheme=nf4:block=8,double=true"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "base")), done.stderr
    config = config_of(files, "rank=2", steps=2, mesh__data=1)
    config.model.name, config.checkpoint.every, config.eval = str(tmp_path / "base"), 0, {"split": ""}
    loop.run(config, tmp_path / "run")
    adapted = load.load_adapted(tmp_path / "run" / "adapter", config.model.name)
    assert adapted.quantized["double"] is True
    merging.merge_to_hf(adapted.params, adapted, tmp_path / "merged", codes="requantize")
    assert not pretrained.load(str(tmp_path / "merged")).quantized
    with pytest.raises(UserError, match=r"'nf5' \(did you mean 'nf4'\?\)"):
        quantization.write_quantized(str(files / "llama"), "nf5", tmp_path / "other")
