"""Eight small tokenizers of the kinds that models have, trained here, and chat templates like those of their models.

The templates are written for these tests: they have the structure of the models' own, with the tag `generation`.
"""

import json
import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{% if m.role == 'assistant' %}model\n{% generation %}{{ m.content | trim }}"
    "<end_of_turn>{% endgeneration %}\n{% else %}user\n{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Transformers learns nothing from an answer on whose first character there is no token: each begins with a word.
WORDPIECE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}said {{ m.content }} [SEP]"
    "{% endgeneration %}{% else %}{{ m.content }} [SEP]{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

WORDS = [
    "the",
    "minister",
    "said",
    "that",
    "shares",
    "rose",
    "after",
    "a",
    "strong",
    "first",
    "half",
    "3.14",
    "2024",
    "café",
    "naïve",
    "they'll",
    "it's",
    "don't",
]
ODD = [
    "  two  spaces",
    "\ttab\n\n",
    "e\u0301",
    "🙂👍🏽",
    "日本語",
    "x = {'a': [1, 22, 333]}\n    return x",
    "½ ² Ⅷ",
    "ﬁ",
    "\u200b",
    "…",
]


def conversations(count, special, system, seed=0):
    """Random conversations, some of whose texts spell out a `special` token; with `system` turns where they may be."""
    rng = random.Random(seed)

    def text():
        parts = rng.choices(WORDS, k=rng.randint(1, 9)) + rng.sample(ODD, rng.randint(0, 2))
        parts += rng.choices(special, k=1) if rng.random() < 0.05 else []
        rng.shuffle(parts)
        return (" " if rng.random() < 0.1 else "") + " ".join(parts) + ("\n" if rng.random() < 0.1 else "")

    found = []
    for _ in range(count):
        turns = [{"role": "system", "content": text()}] if system and rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 3)):
            turns += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        found.append(turns)
    return found


def _trained(model, trainer, **parts):
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator([" ".join(WORDS), *ODD] * 9, trainer)
    return backend


def _byte_level(special, *splits, normalizer=None):
    steps = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)]
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = {"pre_tokenizer": pre_tokenizers.Sequence(steps), "decoder": decoders.ByteLevel()}
    return _trained(models.BPE(), trainer, **parts, **({"normalizer": normalizer} if normalizer else {}))


def _sentencepiece(special, **parts):
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    model = models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=[*special, *fallback], show_progress=False)
    backend = _trained(model, trainer, **parts)
    vocab, merges = backend.get_vocab(), _merges(backend)  # again, as bytes are no special tokens
    whole = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    again = Tokenizer(whole)
    for name, part in parts.items():
        setattr(again, name, part)
    again.add_special_tokens(special)
    return again


def _merges(backend):
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def _starting(backend, bos):
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


SPACES = normalizers.Replace(" ", "▁")
SP = ["<unk>", "<s>", "</s>"]


def _wordpiece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    backend = _trained(models.WordPiece(unk_token="[UNK]"), trainer, **parts)
    pair = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=pair
    )
    return backend


def _unigram():
    special = [*SP, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    return _trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
L3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPLIT = pre_tokenizers.Split(Regex(GPT4), "isolated")
# name -> (backend, template, {special token: text}, whether the template takes a system's turn)
KINDS = {
    "chatml": lambda: (_byte_level(IM), CHATML, {"eos_token": IM[2]}, True),
    "smollm": lambda: (
        _byte_level(
            IM, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        ),
        SMOLLM,
        {"bos_token": IM[1], "eos_token": IM[2]},
        True,
    ),
    "qwen": lambda: (_byte_level(IM, SPLIT, normalizer=normalizers.NFC()), QWEN, {"eos_token": IM[2]}, True),
    "llama3": lambda: (
        _starting(_byte_level(L3, SPLIT), L3[0]),
        LLAMA3,
        {"bos_token": L3[0], "eos_token": L3[4]},
        True,
    ),
    "gemma": lambda: (
        _starting(_sentencepiece([*SP, "<start_of_turn>", "<end_of_turn>"], normalizer=SPACES), "<s>"),
        GEMMA,
        {"bos_token": "<s>", "eos_token": "<end_of_turn>"},
        False,
    ),
    "mistral": lambda: (
        _starting(
            _sentencepiece(
                [*SP, "[INST]", "[/INST]"],
                pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            ),
            "<s>",
        ),
        MISTRAL,
        {"bos_token": "<s>", "eos_token": "</s>"},
        False,
    ),
    "zephyr": lambda: (
        _starting(_sentencepiece(SP, normalizer=normalizers.Sequence([normalizers.Prepend("▁"), SPACES])), "<s>"),
        ZEPHYR,
        {"bos_token": "<s>", "eos_token": "</s>"},
        True,
    ),
    "phi": lambda: (_unigram(), PHI, {"bos_token": "<s>", "eos_token": "<|end|>"}, True),
    "wordpiece": lambda: (_wordpiece(), WORDPIECE, {"cls_token": "[CLS]", "sep_token": "[SEP]"}, True),
}
