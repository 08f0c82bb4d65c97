"""Vocabularies alone give the ids of SentencePiece itself, and of transformers."""

import io
import json

import pytest
import sentencepiece
import transformers

from lowrank.core.errors import UserError
from lowrank.pretrained.tokenizer import load_tokenizer
from tests.support.chat_tokenizers import ODD, WORDS

TEXTS = [" ".join(WORDS), "a  b", " first", "x\ny", *ODD, ""]
MODELS = {"bpe": ("llama", {"byte_fallback": True}), "unigram": ("t5", {})}


def train(kind, options):
    """The bytes of a SentencePiece model."""
    made = io.BytesIO()
    sentences = iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 20 + ODD * 20)
    settings = {"model_type": kind, "vocab_size": 400 if options else 90, "character_coverage": 1.0, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=made, hard_vocab_limit=False, minloglevel=2, pad_id=3, **settings
    )
    return made.getvalue()


@pytest.mark.parametrize("kind", MODELS)
def test_a_sentencepiece_model_alone(tmp_path, kind):
    model_type, options = MODELS[kind]
    model = train(kind, options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if kind == "bpe":
        with pytest.raises(UserError, match=r"name its class in tokenizer_config\.json, such as .*LlamaTokenizer"):
            load_tokenizer(tmp_path, {})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    ours = load_tokenizer(tmp_path, {"model_type": model_type})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert ours.eos_id == plain.eos_id() == theirs.eos_token_id
    for text in TEXTS:
        assert ours.encode_special(text) == theirs(text)["input_ids"], text
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    for text in (TEXTS[0], "x y"):
        assert ours.encode(text) == plain.encode(text), text


def test_a_vocabulary_of_words_alone(tmp_path):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *["##e", "##s", "the", "said"],
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    ours = load_tokenizer(tmp_path, {"model_type": "bert"})
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 3, 0)
    assert (
        ours.encode_special("The saides, a")
        == transformers.AutoTokenizer.from_pretrained(tmp_path)("The saides, a")["input_ids"]
    )
    assert ours.encode("The saids") == [words.index(x) for x in ("the", "said", "##s")]
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path, {}).encode("The saids") == ours.encode("The saids")


def test_what_cannot_be_converted_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"transformers cannot convert tokenizer\.model: ") as caught:
        load_tokenizer(tmp_path, {})
    assert "\n" not in str(caught.value)
