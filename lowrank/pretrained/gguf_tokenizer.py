"""The tokenizer of a GGUF file, rebuilt from its vocabulary and its merges or scores.

llama.cpp's `gpt2` vocabulary is byte-level BPE with merges; its `llama` vocabulary is SentencePiece BPE with scores.
"""

import dataclasses
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lowrank.core.errors import UserError, plural, unknown
from lowrank.pretrained import tokenizer
from lowrank.pretrained.gguf_file import GGUF

K = "tokenizer.ggml."
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6  # token types
# Tokens that end a turn or a text, whatever the metadata declare; llama.cpp finds them by their text, too.
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<eos>", "</s>")


@dataclasses.dataclass(frozen=True)
class Split:
    """How text is split before byte-level BPE. `regex` None: GPT-2's own split."""

    regex: str | None = None
    digits: bool = False  # every digit is a separate piece
    nfc: bool = False
    whole_words: bool = False  # a piece that is in the vocabulary is not built by merges
    bos: bool = False  # whether a text starts with <bos> if the file does not declare it


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = Split(_CONTRACTIONS + "{1,3}" + _REST, whole_words=True, bos=True)
_QWEN2 = Split(_CONTRACTIONS + _REST, nfc=True)
_DIGITS = Split(digits=True)
SPLITS = {  # names that llama.cpp treats alike are values of their own
    "gpt-2": Split(),
    "olmo": Split(),
    "smollm": _DIGITS,
    "refact": _DIGITS,
    "starcoder": _DIGITS,
    "dbrx": Split(_CONTRACTIONS + "{1,3}" + _REST),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": Split(_TEKKEN, whole_words=True, bos=True),
}

ONLY_SPLITS = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}  # architectures with one split for all models
LLAMA3_TOKEN = "<|start_header_id|>"


def build_tokenizer(file: GGUF) -> tokenizer.Tokenizer:
    """The tokenizer of a GGUF file. Raises UserError for an unknown kind and for inconsistent metadata."""
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = file.get(f"{K}model")
    if kind not in kinds:
        raise unknown("GGUF tokenizer", kind, kinds)
    tokens = file.get(f"{K}tokens")
    types = file.get(f"{K}token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        sizes = f"{plural(len(types), 'token type')} for {plural(len(tokens), 'token')}"
        raise UserError(f"{file.path} has {sizes}: the file is corrupt")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{file.path}: a token is in the vocabulary twice")
    try:
        backend, bos = kinds[kind](file, tokens, types)
    except UserError:
        raise
    except Exception as e:  # the library raises nothing narrower
        raise UserError(f"{file.path}: the tokenizer cannot be rebuilt: {e}") from None
    _add_whole_tokens(backend, tokens, types)
    config = _config(file, tokens)
    if file.get(f"{K}add_bos_token", bos) and "bos_token" in config:
        backend.post_processor = _bos_first(config["bos_token"], backend)
    stops = [i for i, (text, type_) in enumerate(zip(tokens, types, strict=True)) if type_ == CONTROL and text in ENDS]
    stops += [file.metadata[f"{K}{name}"] for name in ("eot_token_id", "eom_token_id") if f"{K}{name}" in file.metadata]
    return tokenizer.Tokenizer(backend, config, stops)


def _config(file: GGUF, tokens: list[str]) -> dict[str, Any]:
    """The fields of the `tokenizer_config.json` that the file stands for."""
    config = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = file.get(f"{K}{key}_token_id", -1)
        if index >= len(tokens):
            raise UserError(f"{file.path}: {key}_token_id {index} is not in the vocabulary of {len(tokens)}")
        if index >= 0:
            config[f"{name}_token"] = tokens[index]
    if template := file.get("tokenizer.chat_template", ""):
        config["chat_template"] = template
    return config


def _byte_level(file: GGUF, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    pre = file.metadata.get(f"{K}pre") or _only_split(file.get("general.architecture"), tokens)
    if pre is None:
        known = ", ".join(SPLITS)
        advice = f"add it with the package gguf (gguf-new-metadata --pre-tokenizer=NAME; known: {known})"
        raise UserError(f"{file.path} has no {K}pre, which says how its model's texts are split: {advice}")
    if pre not in SPLITS:
        raise unknown("GGUF pre-tokenizer", pre, SPLITS)
    split = SPLITS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in file.get(f"{K}merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    steps += [pre_tokenizers.Split(Regex(split.regex), "isolated")] if split.regex else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, split.bos


def _only_split(arch: str, tokens: list[str]) -> str | None:
    """The split of a file that does not name its own, where the architecture or the vocabulary leave no doubt."""
    return ONLY_SPLITS.get(arch) or ("llama-bpe" if LLAMA3_TOKEN in tokens else None)


def _sentencepiece(file: GGUF, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(tokens, file.get(f"{K}scores"), types)
    first_unknown = next((i for i, type_ in enumerate(types) if type_ == UNKNOWN), 0)
    unknown_token = tokens[file.get(f"{K}unknown_token_id", first_unknown)]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=BYTE in types)
    )
    prefix = file.get(f"{K}add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a token, the best score first: the merges of SentencePiece's BPE."""
    pieces = {t: s for t, s, type_ in zip(tokens, scores, types, strict=True) if type_ not in (CONTROL, USER, BYTE)}
    pairs = []
    for token, score in pieces.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs += [(-score, left, right) for left, right in cuts if left in pieces and right in pieces]
    pairs.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in pairs]


def _add_whole_tokens(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Adds the tokens that are matched whole, before the text is split."""
    for type_, special in ((CONTROL, True), (USER, False)):
        whole = [
            AddedToken(t, normalized=False, special=special) for t, ty in zip(tokens, types, strict=True) if ty == type_
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(whole)


def _bos_first(bos: str, backend: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )
