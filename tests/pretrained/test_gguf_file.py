"""Laws of GGUF files: what the gguf package writes is what is read, and a damaged file is refused."""

import gguf
import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.pretrained.gguf_file import open_gguf
from tests.support import checkpoint_files as files

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.rope.freq_base": 1234.5,
    "some.flag": True,
    "some.text": "naïve 日本 🙂",
    "some.numbers": [1.5, -2.0],
    "some.strings": ["a", "", "ß"],
}
BLOCKS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {kind: rng.normal(size=(10, 64)).astype(np.float32) for kind in BLOCKS}
    arrays["vector"] = rng.normal(size=7).astype(np.float32)
    return files.write_gguf(tmp_path / "x.gguf", METADATA, arrays, {kind: kind for kind in BLOCKS})


def test_the_header_is_what_the_packages_own_reader_finds(path):
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert ours.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == METADATA
    assert {n: (t.shape, t.dtype) for n, t in ours.tensors.items()} == {
        t.name: (tuple(t.shape[::-1].tolist()), t.tensor_type.name) for t in theirs.tensors
    }


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_are_those_of_the_dequantized_tensor(path, kind):
    tensor = open_gguf(path).tensors[kind]
    theirs = next(t for t in gguf.GGUFReader(path).tensors if t.name == kind)
    want = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    assert tensor.readable
    np.testing.assert_array_equal(tensor.read(0, 10), want)
    np.testing.assert_array_equal(tensor.read(3, 8), want[3:8])


def test_a_vector_is_read_in_parts(path):
    vector = open_gguf(path).tensors["vector"]
    np.testing.assert_array_equal(np.concatenate([vector.read(0, 3), vector.read(3, 7)]), vector.read(0, 7))
    assert len(vector.read(0, 7)) == 7


def test_a_file_cut_anywhere_is_refused_by_name(path, tmp_path):
    data, cut = path.read_bytes(), tmp_path / "cut.gguf"
    last = max(t.read.args[1] + 28 for t in open_gguf(path).tensors.values())  # the vector ends the data
    for size in [*range(0, 700, 13), len(data) // 2, last - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.gguf is truncated or corrupt") as error:
            open_gguf(cut)
        assert "\n" not in str(error.value)


def test_flipped_bits_in_the_header_raise_nothing_else(path, tmp_path):
    data, broken, refused = path.read_bytes(), tmp_path / "broken.gguf", 0
    for at in range(0, 900, 7):
        broken.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            open_gguf(broken)
        except UserError:
            refused += 1
    assert refused > 40


def test_a_missing_key_is_named(path):
    with pytest.raises(UserError, match=r"x\.gguf has no metadata 'llama\.vocab_size'"):
        open_gguf(path).get("llama.vocab_size")
    assert open_gguf(path).get("llama.vocab_size", 3) == 3


def test_integers_cannot_be_read_as_floats(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "llama")
    writer.add_tensor("ids", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not open_gguf(tmp_path / "i.gguf").tensors["ids"].readable
