"""Records become token sequences that fit: the text is cut, the answer never.

Shapes: N tokens of one sequence.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError, nearest
from lowrank.core.typing import HostArrays
from lowrank.data.render import Piece, Renderer
from lowrank.data.templates import Record

Encoded = tuple[list[int], list[bool]]  # ids, and which of them are to be learned
_CHARACTERS = 6  # a token is shorter than that on average: of a very long text only so much is encoded
_WORD = 40  # a cut moves back to the start of a word, if there is one within so many characters


@dataclasses.dataclass(frozen=True)
class Language:
    """Sequences for next-token prediction: `tokens`, `targets` int32 and `weights` float32, `[N]`, N <= `length`.

    A target weighs 1 where the answer (its end included) is predicted and `prompt_weight` elsewhere. A record that is
    too long loses the end of its long text; a document is cut into pieces that overlap by one token, so that each of
    its tokens but the first is predicted once.
    """

    renderer: Renderer
    tokenizer: Any
    length: int
    prompt_weight: float

    @property
    def document(self) -> bool:
        """Whether no record has an answer of its own."""
        return self.renderer.document

    def __call__(self, record: Record, where: str) -> tuple[list[HostArrays], bool]:
        """`(sequences, whether the text was shortened)`. Raises UserError naming `where`."""
        limit = self.length + 1  # the last token is only predicted
        if self.renderer.document:
            ids, learned = self._join(self.renderer.pieces(record, where), where)
            starts = range(0, max(1, len(ids) - 1), self.length)
            return [self._shift(ids[i : i + limit], learned[i : i + limit]) for i in starts], False

        def build(long: str | None) -> Encoded:
            return self._join(self.renderer.pieces(record, where, long), where)

        text = functools.partial(self.renderer.long_text, record, where)
        (ids, learned), cut = fit(build, self.tokenizer, text, limit, where)
        return [self._shift(ids, learned)], cut is not None

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks a field or an answer; nothing is encoded."""
        self.renderer.answer(record, where)

    def prompt(self, record: Record, where: str, reserve: int) -> tuple[str, list[int]]:
        """`(text, ids)` of the prompt alone, shortened so that `reserve` tokens more fit into `length`."""

        def build(long: str | None) -> Encoded:
            return start(self.tokenizer, [(self.renderer.prompt(record, where, long), False)])

        text = functools.partial(self.renderer.long_text, record, where)
        (ids, _), cut = fit(build, self.tokenizer, text, self.length - reserve, where)
        return self.renderer.prompt(record, where, cut), ids

    def _join(self, pieces: Sequence[Piece], where: str) -> Encoded:
        ids, learned = start(self.tokenizer, pieces)
        if not self.renderer.closed and ids[-1:] != [self.tokenizer.eos_id]:
            ids, learned = [*ids, self.tokenizer.eos_id], [*learned, True]
        if len(ids) < 2:
            raise UserError(f"{where}: nothing to predict in a single token")
        return ids, learned

    def _shift(self, ids: Sequence[int], learned: Sequence[bool]) -> HostArrays:
        weights = np.where(np.asarray(learned[1:], bool), 1.0, self.prompt_weight)
        return {
            "tokens": np.asarray(ids[:-1], np.int32),
            "targets": np.asarray(ids[1:], np.int32),
            "weights": weights.astype(np.float32),
        }


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Sequences for classification: `tokens` int32 `[N]` with the tokenizer's special tokens, and `labels`."""

    renderer: Renderer
    tokenizer: Any
    length: int
    label_field: str
    labels: tuple[str, ...]
    document = False

    def __call__(self, record: Record, where: str) -> tuple[list[HostArrays], bool]:
        """`([sequence], whether the text was shortened)`. Raises UserError naming `where`."""

        def build(long: str | None) -> Encoded:
            ids = self.tokenizer.encode_special(self.text(record, where, long))
            return ids, [False] * len(ids)

        text = functools.partial(self.renderer.long_text, record, where)
        (ids, _), cut = fit(build, self.tokenizer, text, self.length, where)
        return [{"tokens": np.asarray(ids, np.int32), "labels": np.int32(self.label(record, where))}], cut is not None

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks a field or a known label; nothing is encoded."""
        self.renderer.answer(record, where)
        self.label(record, where)

    def text(self, record: Record, where: str, long: str | None = None) -> str:
        """The text that is classified."""
        return "".join(text for text, _ in self.renderer.pieces(record, where, long))

    def label(self, record: Record, where: str) -> int:
        """The index of the record's label in `labels`."""
        if self.label_field not in record:
            raise UserError(f"{where}: the record has no field {self.label_field!r}{nearest(self.label_field, record)}")
        name = str(record[self.label_field])
        if name not in self.labels:
            known = ", ".join(self.labels)
            raise UserError(f"{where}: unknown label {name!r}{nearest(name, self.labels)}; known: {known}")
        return self.labels.index(name)


def start(tokenizer: Any, pieces: Sequence[Piece]) -> Encoded:
    """The pieces' ids, each encoded on its own, behind the start token if the tokenizer puts one before a text."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, learn in pieces:
        new = tokenizer.encode(text)
        ids += new
        learned += [learn] * len(new)
    first = tokenizer.encode_special("")[:1]
    if first == [tokenizer.bos_id] != ids[:1]:
        return [*first, *ids], [False, *learned]
    return ids, learned


def fit(
    build: Callable[[str | None], Encoded], tokenizer: Any, text: Callable[[], str], limit: int, where: str
) -> tuple[Encoded, str | None]:
    """`(build(cut), cut)` with at most `limit` ids: `cut` is None, or as long a start of `text()` as was found to fit.

    Raises UserError when what is around the text is too long by itself.
    """
    whole = text()
    head = whole[: _CHARACTERS * limit]
    ids = tokenizer.encode(head) if len(head) < len(whole) else []
    if len(ids) <= limit:  # short enough to try
        encoded = build(None)
        if len(encoded[0]) <= limit:
            return encoded, None
        ids = tokenizer.encode(whole)
    around = len(build("")[0])
    if around > limit:
        raise UserError(f"{where}: {around} tokens without the text that may be cut; at most {limit} fit")
    keep, excess = limit - around, 1
    while excess > 0:
        cut = shorten(whole, len(tokenizer.decode(ids[:keep]))) if keep > 0 else ""
        encoded = build(cut)
        excess = len(encoded[0]) - limit
        keep -= excess
    return encoded, cut


def shorten(text: str, size: int) -> str:
    """At most the first `size` characters of `text`, ending with a whole word if its words are short."""
    if size >= len(text):
        return text
    head = text[:size]
    words = head.rstrip() if text[size].isspace() else head[: max(head.rfind(" "), head.rfind("\n"), 0)].rstrip()
    return words if words and size - len(words) <= _WORD else head
