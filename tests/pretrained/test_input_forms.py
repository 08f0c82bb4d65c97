"""Checkpoints in the forms that people bring: wrapped with a model of images, in 8-bit floats, as LFS pointers."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowrank.core.errors import UserError
from lowrank.pretrained import describe, export, load
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import GEMMA3, LLAMA

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


@pytest.mark.parametrize(("file", "remedy"), [("model.safetensors", "git lfs pull"), ("model.gguf", "git lfs pull")])
def test_a_pointer_of_git_lfs_is_named(tmp_path, file, remedy):
    folder = files.directory(tmp_path / "m", LLAMA)
    (folder / file).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{file} is a Git LFS pointer, .*{remedy}") as error:
        describe(str(folder / file if file.endswith("gguf") else folder))
    assert "\n" not in str(error.value)


OLD, NEW = ("language_model.", "vision_tower."), ("model.language_model.", "model.vision_tower.")


@pytest.mark.parametrize(("text", "vision"), [OLD, NEW])
@pytest.mark.parametrize(("outer", "hf"), [("gemma3", GEMMA3), ("mistral3", {**LLAMA, "model_type": "mistral"})])
def test_the_text_model_of_a_wrapped_one_is_read_alone(tmp_path, caplog, outer, hf, text, vision):
    hf = {**hf, "tie_word_embeddings": False}
    arrays = files.tensors(hf)
    alone = load(str(files.write_directory(tmp_path / "alone", hf, arrays)))
    drop = "model." if text == NEW[0] else ""
    names = {n: n if n.startswith("lm_head") and drop else text + n.removeprefix(drop) for n in arrays}
    wrapped = {names[n]: x for n, x in arrays.items()} | {f"{vision}patch.weight": np.ones((2, 2), np.float32)}
    config = {"model_type": outer, "vocab_size": hf["vocab_size"], "text_config": hf, "vision_config": {}}
    folder = files.write_directory(tmp_path / "wrapped", config, wrapped)
    with caplog.at_level(logging.INFO, logger="absl"):
        read = load(str(folder))
    assert (read.family, read.config) == (alone.family, alone.config)
    jax.tree.map(np.testing.assert_array_equal, read.params, alone.params)
    assert "1 tensor skipped" in caplog.text
    again = load(str(export(read.params, read, tmp_path / "out")))
    assert (again.family, again.config) == (alone.family, alone.config)


def test_a_wrapped_model_without_a_text_model_is_refused(tmp_path):
    config = {"model_type": "gemma3", "vocab_size": 32, "text_config": LLAMA}
    folder = files.write_directory(tmp_path / "m", config, {f"vision.{i}": np.ones((32, 32), "f") for i in range(9)})
    with pytest.raises(UserError, match="holds no language model"):
        load(str(folder))


def compressed(kind):
    weights = {"type": kind, "num_bits": 8}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 4]}
FP8 = {
    "blocks": (BLOCKS, "_scale_inv", lambda w: (-(-w[0] // 8), -(-w[1] // 4))),
    "tensor": ({"quant_method": "fp8"}, "_scale_inv", lambda w: ()),
    "row": (compressed("float"), "_scale", lambda w: (w[0], 1)),
    "compressed tensor": (compressed("float"), "_scale", lambda w: (1,)),
}


def fp8_folder(folder, quantization, end, scales):
    """A checkpoint with 8-bit matrices in layers, and the arrays that it stands for."""
    rng, arrays = np.random.default_rng(0), files.tensors(LLAMA)
    stored = dict(arrays)
    for name, x in arrays.items():
        if "proj" not in name:
            continue
        shape = scales(x.shape)
        scale = rng.uniform(0.5, 2, shape).astype(ml_dtypes.bfloat16)
        stored[name], stored[name + end] = x.astype(ml_dtypes.float8_e4m3fn), scale
        stored[name.replace("weight", "input_scale")] = np.ones((), np.float32)
        grid = np.asarray(scale, np.float32).reshape(shape if len(shape) == 2 else (1, 1))
        step = [8, 4] if quantization is BLOCKS else [-(-n // m) for n, m in zip(x.shape, grid.shape, strict=True)]
        factors = np.repeat(np.repeat(grid, step[0], 0), step[1], 1)[: x.shape[0], : x.shape[1]]
        arrays[name] = stored[name].astype(np.float32) * factors
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": quantization}))
    files.write_tokenizer(folder, LLAMA["vocab_size"])
    return folder, arrays


@pytest.mark.parametrize("kind", FP8)
def test_matrices_in_8_bit_floats_are_multiplied_by_their_scales(tmp_path, kind):
    folder, arrays = fp8_folder(tmp_path / "m", *FP8[kind])
    read, plain = load(str(folder)), load(str(files.write_directory(tmp_path / "plain", LLAMA, arrays)))
    jax.tree.map(np.testing.assert_array_equal, read.params, plain.params)
    out = export(read.params, read, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert load_file(out / "model.safetensors").keys() == arrays.keys()


def test_scales_that_do_not_divide_their_matrix_are_named(tmp_path):
    folder, _ = fp8_folder(tmp_path / "m", {**BLOCKS, "weight_block_size": [2, 2]}, *FP8["blocks"][1:])
    with pytest.raises(UserError, match=r"the scales of tensor '.*' .* have shape .*, not "):
        load(str(folder))


@pytest.mark.parametrize("size", [[0, 4], 8, ["a", "b"], [4]])
def test_block_sizes_that_are_none_are_named(tmp_path, size):
    folder, _ = fp8_folder(tmp_path / "m", {**BLOCKS, "weight_block_size": size}, *FP8["blocks"][1:])
    with pytest.raises(UserError, match=r"weight_block_size is .*: it must be two positive numbers"):
        load(str(folder))


def test_other_numbers_of_the_same_tool_are_refused(tmp_path):
    hf = {**LLAMA, "quantization_config": compressed("int")}
    with pytest.raises(UserError, match="is quantized by compressed-tensors"):
        describe(str(files.directory(tmp_path / "m", hf)))
