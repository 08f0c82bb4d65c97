"""Denoising: spans of a document are lost and follow it behind sentinels, T5's task for a decoder, and UL2's mixture.

Raffel et al. 2020 (arXiv:1910.10683) lose spans that sentinels stand for; Tay et al. 2022 (arXiv:2205.05131) mix such
tasks, each named by a token that comes first: R loses few tokens in short spans, X many or in long spans, and S the end
of the document. A decoder reads what is left from left to right, and learns what follows it: the lost spans, each
behind its sentinel, one more sentinel, and the end token.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core import config_schema
from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data.sentinels import (
    Ids,
    asked_sequence,
    check_unspelled,
    known_family,
    sequence_ids,
    split_ends,
    token_id,
    token_ids,
)

Denoiser = tuple[str, float, float]  # mode, mean length of a lost span in tokens, share of the tokens that is lost
MODES, END = ("R", "S", "X"), "S"  # the mode whose lost tokens are the last ones, as one span
MIXTURES: dict[str, tuple[Denoiser, ...]] = {
    "t5": (("R", 3, 0.15),),
    "ul2": (
        *(("R", 3, 0.15), ("R", 8, 0.15)),
        *(("X", 3, 0.5), ("X", 8, 0.5), ("X", 64, 0.15), ("X", 64, 0.5)),
        ("S", 0, 0.25),
    ),
}
SENTINELS = ("<extra_id_{}>", "<unused{}>", "<|reserved_special_token_{}|>", "[unused{}]")  # T5, Gemma, Llama 3, BERT
MODE_TOKENS = (("[NLU]", "[S2S]", "[NLG]"), ("[R]", "[S]", "[X]"))  # of R, S and X; the first are those of UL2


@dataclasses.dataclass(frozen=True)
class DenoiseConfig:
    """The group `data.denoise`.

    denoisers: a key of `MIXTURES`, or the denoisers themselves, each `(mode, mean length of a lost span, share lost)`.
      Each sequence draws one of them, all with the same chance: one that is listed twice has twice the chance.
    rate: the share of the sequences that lose spans; the others stay as they are.
    sentinels: the tokens that stand for lost spans, in order; a name with `{}` is those with the numbers 0, 1, ... in
      its place. () finds those of T5, and the unused tokens of Gemma, Llama 3 and BERT. Their rows, and those of the
      modes, are learned with `method.also_tokens` or the method `tokens`.
    modes: the tokens of the modes R, S and X; () finds those of UL2, and needs none where all denoisers have one mode.
    """

    denoisers: str | tuple[Denoiser, ...] = "ul2"
    rate: float = 1.0
    sentinels: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise UserError(f"data.denoise.rate={self.rate} is not in [0, 1]")
        if isinstance(self.denoisers, str) and self.denoisers not in MIXTURES:
            raise unknown("data.denoise.denoisers", self.denoisers, MIXTURES)
        if not self.denoisers:
            raise UserError(f"data.denoise.denoisers is empty: name one of {', '.join(MIXTURES)}, or list some")
        for mode, mean, rate in self.mixture:
            if mode not in MODES:
                raise unknown("mode of data.denoise.denoisers", mode, MODES)
            if (mode != END and mean < 1) or not 0 < rate < 1:
                shown = (mode, mean, rate)
                raise UserError(f"data.denoise.denoisers: {shown} needs a mean length of at least 1, a share in (0, 1)")
        for name, count in (("modes", len(MODES)), ("sentinels", len(self.sentinels))):
            names = getattr(self, name)
            if names and (len(names) != count or len(set(names)) != count):
                asked = "three different tokens, of R, S and X" if name == "modes" else "different tokens"
                raise UserError(f"data.denoise.{name} must be {asked}")

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """The denoisers."""
        return MIXTURES[self.denoisers] if isinstance(self.denoisers, str) else self.denoisers


def counts(length: np.ndarray, denoiser: Denoiser) -> tuple[np.ndarray, np.ndarray]:
    """`(lost tokens, spans)` of sequences of these lengths, at least 2 each."""
    mode, mean, rate = denoiser
    lost = np.clip(np.rint(length * rate).astype(int), 1, length - 1)
    spans = np.ones_like(lost) if mode == END else np.maximum(1, np.rint(lost / mean).astype(int))
    return lost, np.minimum(spans, np.minimum(lost, length - lost))


def corrupt(ids: Ids, kept: Sequence[int], lost: Sequence[int], sentinels: Sequence[int]) -> tuple[Ids, Ids]:
    """`(what is left, what was lost)` of a sequence that is cut into parts of these lengths, a kept one first.

    The sentinel of a span stands in its place and before it, and one more sentinel ends what was lost.
    """
    left: Ids = []
    gone: Ids = []
    at = 0
    for keep, lose, sentinel in zip(kept, lost, sentinels, strict=False):
        left += [*ids[at : at + keep], sentinel]
        gone += [sentinel, *ids[at + keep : at + keep + lose]]
        at += keep + lose
    return left, [*gone, sentinels[len(lost)]]


@dataclasses.dataclass(frozen=True)
class Denoise:
    """Loses spans of sequences of at most `room` tokens; `modes` and `sentinels` are ids, `modes` empty without any."""

    config: DenoiseConfig
    tokenizer: Tokenizer
    room: int
    sentinels: tuple[int, ...]
    modes: tuple[int, ...]

    def check(self, sequence: Mapping[str, Any], where: str) -> None:
        """Raises UserError if a text spells out a sentinel or a mode."""
        added = (*self.sentinels, *self.modes)
        check_unspelled(sequence_ids(sequence), added, self.tokenizer, "data.denoise", where)

    def __call__(self, sequence: HostArrays, draw: Sequence[int]) -> HostArrays:
        """The sequence without its lost spans, which follow it, or as it is; `draw` seeds all choices.

        The lengths of the lost spans, and of what is kept between them, are uniform among those that add up. A sequence
        of one token stays as it is.
        """
        random = np.random.default_rng(draw)
        if random.random() >= self.config.rate:
            return sequence
        denoiser = self.config.mixture[random.integers(len(self.config.mixture))]
        start, body = split_ends(sequence, self.tokenizer)
        if len(body) < 2:
            return sequence
        lost, spans = (int(n) for n in counts(np.asarray(len(body)), denoiser))
        kept, gone = (_parts(n, spans, random) for n in (len(body) - lost, lost))
        before, learned = corrupt(body, kept, gone, self.sentinels)
        mode = [self.modes[MODES.index(denoiser[0])]] if self.modes else []
        return asked_sequence([*start, *mode, *before], [*learned, self.tokenizer.eos_id], everything=False)


def _parts(total: int, count: int, random: np.random.Generator) -> list[int]:
    """`count` random positive lengths that add up to `total`."""
    ends = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(ends, prepend=0, append=total).tolist()


def build_denoise(group: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Denoise:
    """The transform of the group `data.denoise` for rows of `length` tokens.

    Raises UserError for a wrong option, for tokens that the vocabulary lacks, and for fewer sentinels than rows of this
    length may need.
    """
    config = config_schema.call_with_group(DenoiseConfig, group, "data.denoise")
    modes = config.modes or known_family(tokenizer, MODE_TOKENS)
    if not modes and len({mode for mode, _, _ in config.mixture}) > 1:
        raise UserError(
            "the vocabulary has no tokens of UL2's modes: name three of its tokens in data.denoise.modes, of R, S and "
            "X, and train them with method.also_tokens"
        )
    ids = token_ids(tokenizer, modes, "data.denoise.modes")
    room, needed = _room(config, length, bool(modes))
    sentinels = _sentinels(config, tokenizer)
    if len(sentinels) < needed:
        has = f"data.denoise has {plural(len(sentinels), 'sentinel')}, and data.seq_len={length} may need {needed}"
        raise UserError(f"{has}: name more in data.denoise.sentinels, lower data.seq_len, or lose longer spans")
    if both := set(ids) & set(sentinels):
        raise UserError(f"data.denoise: {tokenizer.token(min(both))!r} is a mode and a sentinel: name another")
    return Denoise(config, tokenizer, room, sentinels, ids)


def _room(config: DenoiseConfig, length: int, has_modes: bool) -> tuple[int, int]:
    """`(the most tokens of a sequence that fits into a row with what is added to it, the sentinels that it needs)`."""
    lengths = np.arange(2, length + 2)  # of a sequence with the token that only is a target
    spans = np.max([counts(lengths, denoiser)[1] for denoiser in config.mixture], axis=0)
    # a sentinel for each span, twice, and the last one; the mode; the end token
    fits = np.maximum.accumulate(lengths + 2 * spans + 1 + has_modes + 1) <= length + 1
    if not fits.any():
        raise UserError(f"data.seq_len={length} has no room for what data.denoise adds: raise it")
    last = np.flatnonzero(fits)[-1]
    return int(lengths[last]) - 1, int(spans[: last + 1].max()) + 1


def _sentinels(config: DenoiseConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of the sentinels, in order."""
    names = config.sentinels or [n for n in SENTINELS if token_id(tokenizer, n.format(0)) is not None][:1]
    found: list[int] = []
    for name in names:
        numbered = (token_id(tokenizer, name.format(i)) for i in itertools.count())
        of_name = list(itertools.takewhile(lambda i: i is not None, numbered)) if "{}" in name else []
        found += of_name or token_ids(tokenizer, (name,), "data.denoise.sentinels")
    return tuple(found)
