"""Gaps in held-out documents, by a stated rule: the text before a gap, its middle, and the text after it.

The rule depends on the number of the document alone, so that all models fill the same gaps. It is one of

- `span`: a span of at most `longest` characters, of a uniform length and at a uniform place;
- `line`: one whole line, drawn among those that are not blank;
- `lines`: two to four lines that follow one another.

A gap is never at the start of a document, so that the same tokens are also read from left to right.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import Tokenizer
from lowrank.data.config import DataConfig
from lowrank.data.encode import encode_pieces
from lowrank.data.examples import Examples
from lowrank.data.infill import ADDED, ORDERS, build_infill
from lowrank.data.language import LANGUAGE
from lowrank.data.sentinels import Ids, check_unspelled

MOST_LINES = 4
Places = tuple[int, int] | None  # where a gap begins and ends in its text; None for a text that has none


class Gap(NamedTuple):
    """The ids before a gap, in it and after it, the text in it, and the ids up to where infilling begins."""

    prefix: Ids
    middle: Ids
    text: str
    asked: Ids  # prefix and suffix with their sentinels, up to the place at which the middle is written


def _span(text: str, random: np.random.Generator, longest: int) -> Places:
    for _ in range(10):  # a span of nothing but blanks is drawn again
        start = int(random.integers(1, max(2, len(text))))
        end = min(len(text), start + int(random.integers(1, longest + 1)))
        if text[start:end].strip():
            return start, end
    return None


def _line(text: str, random: np.random.Generator, longest: int) -> Places:
    lines = _lines(text)
    return lines[random.integers(len(lines))] if lines else None


def _several_lines(text: str, random: np.random.Generator, longest: int) -> Places:
    lines = _lines(text)
    if len(lines) < 2:
        return None
    count = int(random.integers(2, min(MOST_LINES, len(lines)) + 1))
    first = int(random.integers(len(lines) - count + 1))
    return lines[first][0], lines[first + count - 1][1]


def _lines(text: str) -> list[tuple[int, int]]:
    """Where the lines after the first begin and end, without their line breaks and without the blank ones."""
    ends = [i for i, character in enumerate(text) if character == "\n"]
    return [(a + 1, b) for a, b in itertools.pairwise([*ends, len(text)]) if text[a + 1 : b].strip()]


MIDDLES: dict[str, Callable[[str, np.random.Generator, int], Places]] = {
    "span": _span,
    "line": _line,
    "lines": _several_lines,
}


def find_gaps(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    length: int,
    middle: str = "span",
    longest: int = 64,
    order: str = "psm",
    sentinels: Sequence[str] = (),
    cuts: str = "characters",
) -> list[Gap]:
    """A gap in each of the documents that has one, in the first `length` tokens of it.

    `order` is a key of `infill.ORDERS`; `sentinels` and `cuts` are those of the group `data.infill`. Raises UserError
    for an unknown name, for sentinels that the vocabulary lacks or a document spells out, and where no document has a
    gap.
    """
    if middle not in MIDDLES:
        raise unknown("middle of a gap", middle, MIDDLES)
    if order not in ORDERS:
        raise unknown("order of a gap", order, ORDERS)
    infill = build_infill({"sentinels": tuple(sentinels), "cuts": cuts}, tokenizer, length)
    gaps = []
    start = encode_pieces(tokenizer, [("", False)])[0]
    for number, document in enumerate(documents):
        ids, offsets = tokenizer.encode_offsets(document)
        check_unspelled(ids, infill.ids, tokenizer, "data.infill", f"document {number}")
        text = document[: offsets[infill.room - 1][1]] if len(ids) > infill.room else document
        found = MIDDLES[middle](text, np.random.default_rng(number), longest)
        if parts := found and _parts(tokenizer, text, *found, cuts):
            prefix, inside, suffix = parts
            excess = max(0, len(start) + len(prefix) + len(inside) + len(suffix) + ADDED - length - 1)
            if prefix and excess <= len(suffix):
                asked = [*start, *ORDERS[order](prefix, suffix[: len(suffix) - excess], infill.ids)]
                gaps.append(Gap([*start, *prefix], inside, tokenizer.decode(inside), asked))
    if not gaps:
        raise UserError(f"none of the documents has a gap of the kind {middle!r}: name another kind")
    return gaps


def _parts(tokenizer: Tokenizer, text: str, begin: int, end: int, cuts: str) -> tuple[Ids, Ids, Ids]:
    """The ids of the text before, in and after a gap; with cuts between tokens, of the tokens that begin in it."""
    if cuts == "characters":
        before, inside, after = (tokenizer.encode(part) for part in (text[:begin], text[begin:end], text[end:]))
        return before, inside, after
    ids, offsets = tokenizer.encode_offsets(text)
    i = next((k for k, (a, _) in enumerate(offsets) if a >= begin), len(ids) - 1)
    j = next((k for k, (a, _) in enumerate(offsets) if a >= end and k > i), len(ids))
    return ids[:i], ids[i:j], ids[j:]


def read_texts(config: DataConfig, tokenizer: Tokenizer) -> list[str]:
    """The documents of a config. Raises UserError as `make_loader` does, and for records with answers of their own."""
    examples = Examples(config, LANGUAGE, tokenizer)
    if not all(encoder.document for encoder in examples.encoders):
        raise UserError("eval.infill has gaps in documents filled in: set a data.template of one text")
    return [examples.example(i, 0)["completion"] for i in range(len(examples))]
