"""Laws of counts in a config: none is larger than the header of the checkpoint allows, and nothing is made before."""

import json

import pytest
from gguf import GGUFReader

from lowrank.core.errors import UserError
from lowrank.pretrained import describe, load
from tests.support import checkpoint_files as files

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]


def folder(path, base=files.LLAMA, **changes):
    files.directory(path, base)
    (path / "config.json").write_text(json.dumps({**base, **changes}))
    return str(path)


@pytest.mark.parametrize("key", SIZES)
def test_a_size_beyond_the_file_is_named(tmp_path, key):
    with pytest.raises(UserError, match=f"config.json's {key} is {10**12}, and its files hold 29 tensors of"):
        load(folder(tmp_path / "m", **{key: 10**12}))


@pytest.mark.parametrize(("base", "key"), [(files.LLAMA, "num_hidden_layers"), (files.GPT2, "n_layer")])
def test_layers_beyond_the_file_are_named(tmp_path, base, key):
    with pytest.raises(UserError, match=f"config.json's {key} is 100, and its files hold"):
        load(folder(tmp_path / "m", base, **{key: 100}))


@pytest.mark.parametrize("value", [-1, "16", 16.5, True, [16]])
def test_what_is_no_count_is_named(tmp_path, value):
    with pytest.raises(UserError, match=r"config.json: max_position_embeddings must be a whole number"):
        load(folder(tmp_path / "m", max_position_embeddings=value))


@pytest.mark.parametrize("value", [-1.0, 1e-300, 1e308])
@pytest.mark.parametrize(("base", "key"), [(files.LLAMA, "rope_theta"), (files.GEMMA3, "rope_local_base_freq")])
def test_a_theta_whose_powers_are_no_numbers_is_named(tmp_path, base, key, value):
    with pytest.raises(UserError, match=r"rope_theta=.* turns no position"):
        describe(folder(tmp_path / "m", base, **{key: value}))


def test_a_model_without_tensors_has_bounds_too(tmp_path):
    where = folder(tmp_path / "m", num_hidden_layers=10**8)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="num_hidden_layers is 100000000: at most 10000 is possible"):
        describe(where)


def test_a_wrong_byte_in_the_block_count_of_a_gguf_file_is_an_error(tmp_path):
    path = files.gguf_twin(tmp_path / "x.gguf", files.LLAMA, files.tensors(files.LLAMA), "llama")
    field = GGUFReader(path).fields["llama.block_count"]
    data = bytearray(path.read_bytes())
    data[field.offset + field.parts[-1].nbytes + sum(p.nbytes for p in field.parts[:-1]) - 1] = 0x7F
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"num_hidden_layers is 21.*, and its files hold"):
        load(str(path))
