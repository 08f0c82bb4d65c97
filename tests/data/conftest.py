"""A byte-level tokenizer and news of two kinds, small enough to read."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lowrank.core.errors import UserError

WORDS = "The minister said on Monday that shares rose after a strong first half for the club and its new chief."


class Bytes:
    """A byte-level BPE with the interface of `lowrank.pretrained`'s tokenizer."""

    bos_id, eos_id, pad_id = 0, 1, 2

    def __init__(self) -> None:
        self._bpe = Tokenizer(models.BPE())
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._bpe.decoder = decoders.ByteLevel()
        special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        self._bpe.train_from_iterator([WORDS] * 3, trainer)
        self.vocab_size, self.stop_ids = self._bpe.get_vocab_size(), (1, 4)

    def encode(self, text):
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids, special=False):
        return self._bpe.decode(ids, skip_special_tokens=not special)

    def encode_special(self, text):
        return [5, *self.encode(text), 6]

    def encode_offsets(self, text):
        encoded = self._bpe.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def token(self, i):
        return self._bpe.id_to_token(i)

    def chat(self, messages, add_generation_prompt=False):
        return self.render_chat(messages, add_generation_prompt)[0]

    def render_chat(self, messages, add_generation_prompt=False):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else ""), []


class Silent(Bytes):
    """A tokenizer without a chat template."""

    def render_chat(self, messages, add_generation_prompt=False):
        raise UserError("the tokenizer has no chat template")


@pytest.fixture(scope="session")
def tokenizer():
    return Bytes()


@pytest.fixture(scope="session")
def plain_tokenizer():
    return Silent()


@pytest.fixture
def write(tmp_path):
    """Writes records as a JSONL file and returns its spec."""

    def to(records, name="records.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return f"jsonl:{path}"

    return to


@pytest.fixture
def news_folder(tmp_path):
    """Sixty articles in the layout of the wheel, some of them repeats."""
    root = tmp_path / "news"
    for label in ("business", "entertainment", "politics", "sports", "tech"):
        (root / label).mkdir(parents=True)
        for i in range(12):
            words = " ".join(f"{label}{i}word{k}" for k in range(30))
            (root / label / f"{i:03}.txt").write_text(f"Headline {label} {i}\n\n{words}\n\nSecond {words}.\n")
    return root
