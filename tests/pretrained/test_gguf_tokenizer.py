"""Laws of rebuilt tokenizers: the ids are those of the tokenizer whose vocabulary was written down."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from lowrank.core.errors import UserError
from lowrank.pretrained import gguf_tokenizer
from lowrank.pretrained.gguf_file import open_gguf
from tests.support import checkpoint_files as files

TEXTS = [
    "the cat sat on the mat, and the cat ran",
    "In 2024, 1234567 people paid 3.14",
    "  two  spaces\n\n\nlines\r\n\ttabs 7 ",
    "naïve café — “quotes” 日本語 🙂👍🏽",
    "def f(x):\n    return x ** 2",
    "I'm THEY'LL it's",
    "<|im_start|>user\n9<|im_end|>",
    "\n 7\n\n 8  9",
    "",
]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def rebuilt(tmp_path, tokens, **metadata):
    keys = {f"tokenizer.{k}" if k == "chat_template" else f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    full = {"general.architecture": "llama", "tokenizer.ggml.tokens": tokens, **keys}
    return gguf_tokenizer.build_tokenizer(
        open_gguf(files.write_gguf(tmp_path / "t.gguf", full, {"x": np.ones(3, np.float32)}))
    )


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {  # as the models' own tokenizer.json has them
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}

SPLITS |= {"olmo": SPLITS["gpt-2"], "refact": SPLITS["smollm"], "dbrx": SPLITS["llama-bpe"]}


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_ids_are_those_of_the_trained_tokenizer(tmp_path, pre):
    original = tokenizers.Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    original.train_from_iterator(TEXTS * 3, trainer)
    tokens = [original.id_to_token(i) for i in range(original.get_vocab_size())]
    state = json.loads(original.to_str())
    tokenizer = rebuilt(
        tmp_path,
        tokens,
        model="gpt2",
        pre=pre,
        token_type=[3 if t in CONTROLS else 1 for t in tokens],
        merges=[" ".join(pair) for pair in state["model"]["merges"]],
        eos_token_id=2,
    )
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text).ids, text
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    assert tokenizer.stop_ids == (0, 2)


def test_qwen_composes_characters_first(tmp_path):
    tokens = [*CONTROLS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    options = {"model": "gpt2", "merges": ["a b"], "token_type": [3] * 3 + [1] * 257, "eos_token_id": 2}
    qwen, gpt2 = (rebuilt(tmp_path, tokens, pre=pre, **options) for pre in ("qwen2", "gpt-2"))
    assert qwen.encode("e\u0301") == qwen.encode("\u00e9") == gpt2.encode("\u00e9") != gpt2.encode("e\u0301")


def test_a_file_that_does_not_say_how_text_is_split_is_read_only_where_nothing_is_in_doubt(tmp_path):
    tokens = [*CONTROLS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]
    options = {"model": "gpt2", "merges": ["1 2"], "token_type": [3] * 3 + [1] * 257, "eos_token_id": 2}
    with pytest.raises(UserError, match=r"has no tokenizer.ggml.pre, which says how its model's texts are split: add"):
        rebuilt(tmp_path, tokens, **options)
    tokens[1] = "<|start_header_id|>"
    ids = {pre: rebuilt(tmp_path, tokens, pre=pre, **options).encode("12") for pre in ("llama-bpe", "qwen2")}
    assert rebuilt(tmp_path, tokens, **options).encode("12") == ids["llama-bpe"] != ids["qwen2"]


PIECES = [
    "▁",
    "▁t",
    "he",
    "▁the",
    "at",
    "▁c",
    "▁cat",
    "s",
    "t",
    "h",
    "e",
    "c",
    "a",
    "o",
    "▁s",
    "▁sat",
    "▁▁a",
    "on",
    "n",
]
VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "<b>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
TYPES = [3, 3, 3, 2, 4, 4] + [6] * 256 + [1] * len(PIECES)
SCORES = [-1000.0] * 6 + [0.0] * 256 + [-float(i) for i in range(len(PIECES))]


def sentencepiece(text: str) -> list[str]:
    """SentencePiece's BPE as its paper has it: join the neighbors whose union scores best, until none is a piece."""
    scores = dict(zip(PIECES, SCORES[-len(PIECES) :], strict=True))
    parts = list(text.replace(" ", "▁"))
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not unions:
            break
        i = -max(unions)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [t for p in parts for t in ([p] if p in scores else [f"<0x{b:02X}>" for b in p.encode()])]


def spm(tmp_path, **changes):
    options = {
        "model": "llama",
        "scores": SCORES,
        "token_type": TYPES,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "padding_token_id": 0,
        "unknown_token_id": 3,
        "add_space_prefix": False,
    }
    return rebuilt(tmp_path, VOCABULARY, **{**options, **changes})


@pytest.mark.parametrize("text", ["the cat sat", "a cat sat on the oat", " the  é that", "cats", "日the", "tttheee"])
def test_sentencepiece_ids_are_those_of_the_greedy_algorithm(tmp_path, text):
    tokenizer = spm(tmp_path, token_type=[*TYPES[:4], 1, 1, *TYPES[6:]])  # without tokens that are matched as a whole
    pieces = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]
    assert pieces == sentencepiece(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_whole_tokens_come_before_pieces(tmp_path):
    tokenizer = spm(tmp_path)
    pieces = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(" the  a<b>cat")]
    assert pieces == ["▁the", "  ", "a", "<b>", "c", "at"]  # not ▁▁a


def test_a_space_is_put_before_a_text_unless_the_file_says_no(tmp_path):
    with_space = spm(tmp_path, add_space_prefix=True)
    assert with_space.encode("the") == spm(tmp_path).encode(" the")
    assert with_space.decode(with_space.encode("the")) == "the"


@pytest.mark.parametrize(("flag", "first"), [({}, [2]), ({"add_bos_token": True}, [2]), ({"add_bos_token": False}, [])])
def test_a_text_starts_with_bos_as_the_file_says(tmp_path, flag, first):
    tokenizer = spm(tmp_path, **flag)
    assert tokenizer.encode_special("cat") == first + tokenizer.encode("cat")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)


def test_the_chat_template_comes_along(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert spm(tmp_path, chat_template=template).chat([{"role": "user", "content": "x"}]) == "x<eos>"


def test_the_ends_of_turns_stop_generation(tmp_path):
    assert spm(tmp_path, eot_token_id=5).stop_ids == (1, 5)
