"""A merged checkpoint, and its error against float64."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lowrank import methods, pretrained
from lowrank.adapters import adapter_files, export, load, peft
from lowrank.core import tree
from lowrank.core.errors import UserError
from lowrank.core.weight import declared_mask, is_weight
from lowrank.models import build_model
from tests.support import tiny_checkpoint as tiny
from tests.support.adapted_model import adapted
from tests.support.close import assert_close
from tests.support.weight_forms import shaken

GROUPS = {
    "lora": {"name": "lora", "rank": 3, "alpha": 10.0, "rank_pattern": {"layers/1/.*": 0}},
    "dora": {"name": "dora", "rank": 3},
    "ia3": {"name": "ia3"},
}
TOKENS = np.arange(5, 17, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained.load(str(tiny.llama(tmp_path_factory.mktemp("hf") / "tiny-llama")))


def float64(w, layer):
    """`(W, W + dW)` of one layer by the papers' formulas."""
    part = {k: np.asarray(v[layer], np.float64) for k, v in vars(w).items() if isinstance(v, jax.Array)}
    if "s" in part:
        return part["base"], part["base"] * (part["s"][None] if w.side == "out" else part["s"][:, None])
    direction = part["base"] + part["scale"] * part["a"] @ part["b"]
    gain = part["magnitude"] / np.linalg.norm(direction, axis=0) if "magnitude" in part else 1
    return part["base"], direction * gain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
def test_kernels_are_rounded_once_and_the_error_is_that_of_float64(base, name, dtype):
    params = adapted(base.params, GROUPS[name], size=0.1)[0]
    plain, report = export.merged(params, dtype)
    stored, lost, size, ratios = dict(tree.named_leaves(plain)), 0.0, 0.0, {}
    for leaf, w in tree.named_leaves(params, is_weight):
        for i in range(3) if is_weight(w) else ():
            before, exact = float64(w, i)
            np.testing.assert_array_equal(
                np.asarray(stored[leaf][i]), exact.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
            )
            error, change = np.linalg.norm(np.float64(stored[leaf][i]) - exact), np.linalg.norm(exact - before)
            if change:
                lost, size = lost + error**2, size + change**2
                ratios[f"layers/{i}/{leaf.removeprefix('layers/')}"] = error / change
    assert report.matrices == len(ratios)
    assert report.worst_matrix == max(ratios, key=ratios.get)
    assert_close([report.error, report.worst], [(lost / size) ** 0.5, max(ratios.values())])
    assert report.error < {"float32": 1e-5, "bfloat16": 0.5}[dtype]
    assert report.error > {"float32": 1e-9, "bfloat16": 1e-3}[dtype]


def test_a_smaller_update_loses_more_of_itself_in_bfloat16(base):
    errors = [
        export.merged(adapted(base.params, GROUPS["lora"], size)[0], "bfloat16")[1].error for size in (1.0, 0.1, 0.01)
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", GROUPS)
def test_the_checkpoint_is_read_back_as_the_live_model(base, name, tmp_path):
    params = adapted(base.params, GROUPS[name])[0]
    export.merge_to_hf(params, base, tmp_path / "merged")
    again = pretrained.load(str(tmp_path / "merged"))
    live, merged = (build_model(base.config).apply({"params": p}, TOKENS) for p in (params, again.params))
    assert float(jnp.abs(live).max()) > 0.1
    assert_close(merged, live)


def test_layers_without_an_update_are_not_counted(base):
    group = {"name": "dora", "rank": 3, "rank_pattern": {"layers/1/.*": 0}}
    params = methods.attach(methods.build_method(group), base.params, jax.random.key(1))
    params["layers"]["attn"]["q"]["kernel"] = shaken(params["layers"]["attn"]["q"]["kernel"], jax.random.key(2))
    assert export.merged(params, "bfloat16")[1].matrices == 3  # of q; v still stands where it was attached


def test_an_unchanged_model_has_no_error_and_a_full_folder_is_left_alone(base, tmp_path):
    _, report = export.merged(base.params, "float32")
    assert (report.matrices, report.error, report.worst) == (0, 0.0, 0.0)
    with pytest.raises(UserError, match=r"unknown dtype 'float23' \(did you mean 'float32'\?\)"):
        export.merged(base.params, "float23")
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="not an empty directory"):
        export.merge_to_hf(base.params, base, tmp_path)


@pytest.mark.parametrize("group", [{"name": "bitfit"}, {"name": "partial", "layers": 1}, {"name": "head"}])
def test_leaves_saved_by_name_are_merged_too(tmp_path, group):
    folder, method = str(tiny.llama(tmp_path / "tiny-llama")), methods.build_method(group)
    base = pretrained.load(folder, model=method.model_options)
    mask = declared_mask(base.params, method.trainable)
    params = jax.tree.map(lambda x, learns: x + 0.5 if learns else x, base.params, mask)
    adapter_files.save(params, base, tmp_path / "adapter", mask=mask, method=group)
    model = load.load_adapted(tmp_path / "adapter", folder)
    for (name, x), (_, y) in zip(tree.named_leaves(model.params), tree.named_leaves(params), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_an_adapter_that_names_no_base_asks_for_one(base, tmp_path):
    peft.save(adapted(base.params, GROUPS["lora"])[0], base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not record its base"):
        load.load_adapted(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "tiny-llama"}))
    with pytest.raises(UserError, match=r"has the base 'tiny-llama': unknown model .* as --base=MODEL"):
        load.load_adapted(tmp_path)


def test_the_command_merges_and_says_in_one_line_what_is_wrong(base, tmp_path):
    folder = tiny.llama(tmp_path / "tiny-llama")
    peft.save(adapted(base.params, GROUPS["lora"])[0], base, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"name": str(folder)}}))
    command = [sys.executable, "-m", "launch.merge", f"--workdir={tmp_path / 'run'}", "--dtype=bfloat16"]
    run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True, check=False)  # noqa: E731
    done = run(f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("merged 4 matrices into bfloat16: relative error of the update ")
    assert (tmp_path / "out" / "model.safetensors").exists()
    wrong = run("--otuput=x")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "otuput" in wrong.stderr


def test_added_biases_are_told_in_the_config(tmp_path):
    base = pretrained.load(str(tiny.llama(tmp_path / "tiny-llama")), model={"biases": True})
    params = tree.map_named(lambda name, x: x + 0.5 if name.endswith("bias") else x, base.params)
    export.merge_to_hf(params, base, tmp_path / "merged")
    again = pretrained.load(str(tmp_path / "merged"))
    assert (again.config.mlp_bias, again.new) == (True, ())
    for (name, x), (_, y) in zip(tree.named_leaves(again.params), tree.named_leaves(params), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
