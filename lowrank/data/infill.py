"""Infilling: documents whose middle is moved to their end (FIM; Bavarian et al. 2022, arXiv:2207.14255).

Shapes: N tokens of one sequence.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core import config_schema
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data.sentinels import (
    Ids,
    asked_sequence,
    check_unspelled,
    known_family,
    sequence_ids,
    split_ends,
    token_ids,
)

SENTINELS = (  # the marks of prefix, suffix and middle in the vocabularies of models that infill
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
CUTS, LEARNED = ("characters", "tokens"), ("all", "middle")


@dataclasses.dataclass(frozen=True)
class InfillConfig:
    """The group `data.infill`.

    rate: the share of the sequences whose middle is moved; the others stay as they are.
    spm: of those, the share in the order suffix, prefix, middle; the others are in prefix, suffix, middle.
    order: how suffix, prefix, middle is written, a key of `ORDERS`.
    cuts: whether a sequence is cut between characters, which suits cursors anywhere, or between tokens.
    learned: the tokens that are learned in a sequence whose middle is moved: all, or its middle and the end.
    sentinels: the tokens that mark prefix, suffix and middle; () finds those of a model that infills. Others, such as
      tokens that a model never uses, are learned with `method.also_tokens` or the method `tokens`.
    """

    rate: float = 0.5
    spm: float = 0.5
    order: str = "spm"
    cuts: str = "characters"
    learned: str = "all"
    sentinels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rate", "spm"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.infill.{name}={getattr(self, name)} is not in [0, 1]")
        for name, known in (("order", tuple(ORDERS)[1:]), ("cuts", CUTS), ("learned", LEARNED)):
            if getattr(self, name) not in known:
                raise unknown(f"data.infill.{name}", getattr(self, name), known)
        if self.sentinels and (len(self.sentinels) != 3 or len(set(self.sentinels)) != 3):
            raise UserError("data.infill.sentinels must be three different tokens: of prefix, suffix and middle")


# The ids of prefix, suffix and middle, and the three sentinels -> the sequence up to the sentinel of the middle or what
# follows it, and the part that is predicted.
Order = Callable[[Ids, Ids, Sequence[int]], Ids]
ORDERS: dict[str, Order] = {
    "psm": lambda prefix, suffix, s: [s[0], *prefix, s[1], *suffix, s[2]],
    "spm": lambda prefix, suffix, s: [s[0], s[1], *suffix, s[2], *prefix],  # trained jointly with psm: variant 2
    "spm_apart": lambda prefix, suffix, s: [s[1], *suffix, s[0], *prefix, s[2]],  # variant 1
}
ADDED = 4  # three sentinels and the end of the middle


@dataclasses.dataclass(frozen=True)
class Infill:
    """Moves the middle of sequences of at most `length` tokens; `ids` are those of the sentinels."""

    config: InfillConfig
    tokenizer: Tokenizer
    length: int
    ids: tuple[int, ...]

    @property
    def room(self) -> int:
        """The most tokens of a sequence."""
        return self.length - ADDED

    def check(self, sequence: Mapping[str, Any], where: str) -> None:
        """Raises UserError if a text spells out a sentinel."""
        check_unspelled(sequence_ids(sequence), self.ids, self.tokenizer, "data.infill", where)

    def __call__(self, sequence: HostArrays, draw: Sequence[int]) -> HostArrays:
        """The sequence with its middle at the end, or as it is; `draw` seeds the choice and the two cuts.

        The cuts are uniform over all places, both ends included, so that each part may be empty. The end token follows
        the middle. Where characters are cut and so more tokens needed than fit, the end of the suffix is left out; a
        sequence without so long a suffix, or with characters that are cut themselves, stays as it is.
        """
        random = np.random.default_rng(draw)
        if random.random() >= self.config.rate:
            return sequence
        order = self.config.order if random.random() < self.config.spm else "psm"
        start, body = split_ends(sequence, self.tokenizer)
        parts = CUT[self.config.cuts](self.tokenizer, body, random)
        if parts is None:
            return sequence
        prefix, middle, suffix = parts
        excess = max(0, len(start) + len(prefix) + len(middle) + len(suffix) + ADDED - self.length - 1)
        if excess > len(suffix):
            return sequence
        before = [*start, *ORDERS[order](prefix, suffix[: len(suffix) - excess], self.ids)]
        return asked_sequence(before, [*middle, self.tokenizer.eos_id], self.config.learned == "all")


def _cut_tokens(tokenizer: Tokenizer, ids: Ids, random: np.random.Generator) -> tuple[Ids, Ids, Ids]:
    del tokenizer
    a, b = sorted(random.integers(0, len(ids) + 1, 2))
    return ids[:a], ids[a:b], ids[b:]


def _cut_characters(tokenizer: Tokenizer, ids: Ids, random: np.random.Generator) -> tuple[Ids, ...] | None:
    """The ids of the three parts, each encoded apart; None where ids do not come back as the same text."""
    text = tokenizer.decode(ids, special=True)
    a, b = sorted(random.integers(0, len(text) + 1, 2))
    parts = tuple(tokenizer.encode(part) for part in (text[:a], text[a:b], text[b:]))
    same = "\ufffd" not in text and tokenizer.decode([i for part in parts for i in part], special=True) == text
    return parts if same else None


CUT: dict[str, Callable[[Tokenizer, Ids, np.random.Generator], tuple[Ids, ...] | None]] = {
    "characters": _cut_characters,
    "tokens": _cut_tokens,
}


def build_infill(group: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Infill:
    """The transform of the group `data.infill` for rows of `length` tokens.

    Raises UserError for a wrong option, for sentinels that the vocabulary lacks, and for cuts that it cannot make.
    """
    config = config_schema.call_with_group(InfillConfig, group, "data.infill")
    if length <= ADDED:
        raise UserError(f"data.seq_len={length} has no room for what data.infill adds: raise it above {ADDED}")
    sentinels = config.sentinels or known_family(tokenizer, SENTINELS)
    if not sentinels:
        raise UserError(
            "the vocabulary has no sentinels of infilling: name three of its tokens in data.infill.sentinels, "
            "and train them with method.also_tokens"
        )
    if config.cuts == "characters" and tokenizer.token(tokenizer.encode("b")[0]).startswith("▁"):
        raise UserError(
            "the tokenizer puts a space before every text, so that parts of a text do not join: "
            "set data.infill.cuts=tokens"
        )
    return Infill(config, tokenizer, length, token_ids(tokenizer, sentinels, "data.infill.sentinels"))
