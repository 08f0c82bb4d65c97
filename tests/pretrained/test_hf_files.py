"""Laws of safetensors directories: rows are those of the tensor, and a damaged file is refused before it is read."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lowrank.core.errors import UserError
from lowrank.pretrained.hf_files import INDEX, SINGLE, open_directory
from tests.support import checkpoint_files as files
from tests.support.checkpoint_files import LLAMA


@pytest.fixture
def folder(tmp_path):
    return files.directory(tmp_path / "model", LLAMA)


@pytest.mark.parametrize("dtype", files.DTYPES)
def test_rows_are_the_tensors_rows(tmp_path, dtype):
    arrays = files.tensors(LLAMA)
    stored = open_directory(files.write_directory(tmp_path / "m", LLAMA, arrays, dtype=dtype))
    assert stored.keys() == arrays.keys()
    for name, tensor in stored.items():
        want = arrays[name].astype(files.DTYPES[dtype])
        assert (tensor.shape, tensor.dtype, tensor.readable) == (want.shape, dtype, True)
        np.testing.assert_array_equal(tensor.read(0, len(want)), want)
        np.testing.assert_array_equal(tensor.read(3, 7), want[3:7])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused_by_name(folder, keep):
    data = (folder / SINGLE).read_bytes()
    size = keep if keep == int(keep) else int(keep * len(data))
    (folder / SINGLE).write_bytes(data[:size])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or corrupt") as error:
        open_directory(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("at", [0, 7, 8, 20])
def test_a_corrupt_header_is_refused_by_name(folder, at):
    data = bytearray((folder / SINGLE).read_bytes())
    data[at] ^= 0xFF
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or corrupt"):
        open_directory(folder)


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder):
    stored = open_directory(folder)
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])
    last = max(stored, key=lambda name: stored[name].read.args[1])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        stored[last].read(0, stored[last].shape[0])


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_a_checkpoint_that_is_only_a_pickle_is_refused(folder, pickle):
    (folder / SINGLE).rename(folder / pickle)
    with pytest.raises(UserError, match=f"has no model.safetensors, only {pickle}: pickles are never read"):
        open_directory(folder)


def test_no_checkpoint_at_all_is_refused(folder):
    (folder / SINGLE).unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors$"):
        open_directory(folder)


def reindexed(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i["weight_map"].update({"extra": "model-1.safetensors"}), r"model-1.*tensor 'extra' is missing"),
        (lambda i: i["weight_map"].update({"extra": "model-9.safetensors"}), r"model-9\.safetensors is missing"),
        (lambda i: i["weight_map"].update({"extra": "../x.safetensors"}), "which is not a file beside it"),
        (lambda i: i.pop("weight_map"), "weight_map is missing"),
        (lambda i: i["weight_map"].update({"extra": 3}), "must be text, not a whole number"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, edit, message):
    folder = files.directory(tmp_path / "m", LLAMA, shards=2)
    reindexed(folder, edit)
    with pytest.raises(UserError, match=message):
        open_directory(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = files.directory(tmp_path / "m", LLAMA, shards=2)
    name = next(iter(load_file(folder / "model-1.safetensors")))
    (folder / "model-0.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"tensor .* is in another shard too") as error:
        open_directory(folder)
    assert name.split(".")[0] in str(error.value)
