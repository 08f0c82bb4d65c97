"""Laws of a vocabulary that is larger than the model's: only what is looked up must have a row."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from lowrank.core.errors import UserError
from lowrank.pretrained import bounded_backend, describe, load
from tests.support import checkpoint_files as files


@pytest.fixture
def larger(tmp_path):
    """A model of 32 rows and a tokenizer of 34 tokens."""
    folder = files.directory(tmp_path / "model", files.LLAMA)
    files.write_tokenizer(folder, 34)
    return folder


def test_only_a_text_that_holds_such_a_token_is_refused(larger):
    tokenizer = load(str(larger)).tokenizer
    assert (tokenizer.vocab_size, tokenizer.encode("w31"), tokenizer.encode("")) == (32, [31], [])
    for encode in (tokenizer.encode, tokenizer.encode_special, lambda text: tokenizer.encode_batch(["w4", text])):
        with pytest.raises(UserError, match="a text holds the token 'w32' of id 32, and the model has 32 tokens"):
            encode("w4 w32")
    with pytest.raises(UserError, match="the token 'w33'"):
        tokenizer.encode_pair("w4", "w33")


def test_no_special_token_is_one_of_them(larger):
    files.change_tokenizer(larger, pad_token="w33")
    _, tokenizer, _ = describe(str(larger))
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    files.change_tokenizer(larger, eos_token="w32")
    with pytest.raises(UserError, match=f"{larger}: the tokenizer has neither an 'eos_token' nor a 'sep_token'"):
        describe(str(larger))


def test_they_are_saved_with_the_rest(larger, tmp_path):
    _, tokenizer, _ = describe(str(larger))
    tokenizer.save(tmp_path)
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) == 34


def test_a_pattern_that_is_slow_on_a_long_text_is_an_error(monkeypatch):
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("a+b"), "isolated")  # searches to the end from every letter
    monkeypatch.setattr(bounded_backend, "SECONDS", 0.05)
    assert bounded_backend.encode(backend, 500 * "ab").ids == 500 * [0, 1]
    with pytest.raises(UserError, match=r"takes more than 0 s for 30000 characters, from 'aaa.* regular expression"):
        bounded_backend.encode(backend, 30000 * "a")


def test_a_list_that_is_no_id_in_a_generation_config_is_named(larger):
    (larger / "generation_config.json").write_text(json.dumps({"eos_token_id": {"a": 1}}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id must be"):
        describe(str(larger))
