"""Rows for next-token prediction: tokens, their targets, and the weight of each target.

Shapes: N tokens of one sequence.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data.config import DataConfig
from lowrank.data.encode import Ids, encode_pieces, fit
from lowrank.data.render import Piece, Renderer, build_renderer
from lowrank.data.row_format import INDEX, TOKENS, ArraySpec, EncodedSequence, RowFormat
from lowrank.data.sources import Source
from lowrank.data.templates import Record
from lowrank.data.transforms import build_transform

LEARNED = "⟦⟧"  # around what is learned, where a record is shown


@dataclasses.dataclass(frozen=True)
class LanguageEncoder:
    """Sequences for next-token prediction, `[N]`: `tokens`, `targets` int32, `weights` float32, `prompt` bool.

    N is at most `length`. The weight is 1 where a token of the answer (its end token included) is the target, and
    `prompt_weight` elsewhere. `prompt` marks the tokens before the first one that is learned, and the first token of a
    sequence in any case. A record that is too long loses the end of its long text. A document is cut into pieces that
    overlap by one token, so that each of its tokens but the first is a target once.
    """

    renderer: Renderer
    tokenizer: Tokenizer
    length: int
    prompt_weight: float
    labels: tuple[str, ...] = ()

    @property
    def document(self) -> bool:
        """Whether the records have no answers of their own."""
        return self.renderer.document

    def __call__(self, record: Record, where: str) -> tuple[list[EncodedSequence], bool]:
        """`(sequences, whether the text was shortened)`. Raises UserError naming `where`."""
        limit = self.length + 1  # the last token is a target only
        if self.renderer.document:
            ids, learned = self._join(self.renderer.pieces(record, where), where)
            starts = range(0, max(1, len(ids) - 1), self.length)
            return [self._shift(ids[i : i + limit], learned[i : i + limit]) for i in starts], False

        recent, encoded = self._recent(record, where, limit)
        if encoded:
            return [self._shift(*encoded)], recent is not record

        def build(long: str | None) -> Ids:
            return self._join(self.renderer.pieces(recent, where, long), where)

        text = functools.partial(self.renderer.long_text, recent, where)
        (ids, learned), cut = fit(build, self.tokenizer, text, limit, where)
        return [self._shift(ids, learned)], cut is not None or recent is not record

    def _recent(self, record: Record, where: str, limit: int) -> tuple[Record, Ids | None]:
        """`(record, ids)`: a conversation without so many of its oldest exchanges that the others fit.

        The ids are None where only one exchange is left, and for a text, which has no turns.
        """
        while shorter := self.renderer.without_oldest(record, where):
            encoded = self._join(self.renderer.pieces(record, where), where)
            if len(encoded[0]) <= limit:
                return record, encoded
            record = shorter
        return record, None

    def count(self, sequence: EncodedSequence) -> dict[str, int]:
        """Of a sequence: its learned tokens, the answers that they are, and the learned tokens that end a text."""
        assert isinstance(sequence, dict)
        learned = np.concatenate([[False], sequence["weights"] == 1])
        ends = learned[1:] & np.isin(sequence["targets"], [self.tokenizer.eos_id, *self.tokenizer.stop_ids])
        answers = np.sum(learned[1:] & ~learned[:-1])
        return {"learned": int(learned.sum()), "answers": int(answers), "ends": int(ends.sum())}

    def show(self, sequence: EncodedSequence) -> str:
        """The text of a sequence, with what is learned between LEARNED."""
        assert isinstance(sequence, dict)
        ids = [sequence["tokens"][0], *sequence["targets"]]
        learned = [False, *(sequence["weights"] == 1).tolist()]
        parts = itertools.groupby(zip(learned, ids, strict=True), key=lambda pair: pair[0])
        texts = [(learns, self.tokenizer.decode([i for _, i in part], special=True)) for learns, part in parts]
        return "".join(f"{LEARNED[0]}{text}{LEARNED[1]}" if learns else text for learns, text in texts)

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks a field or an answer; nothing is encoded."""
        self.renderer.answer(record, where)

    def example(self, record: Record, where: str, reserve: int) -> dict[str, Any]:
        """`prompt` and `completion` (strings) and `prompt_ids`, the token ids of the prompt with the start token.

        The prompt is shortened so that `reserve` new tokens still fit into `length`.
        """
        prompt, ids = self.prompt(record, where, reserve)
        return {"prompt": prompt, "prompt_ids": ids, "completion": self.renderer.answer(record, where)}

    def prompt(self, record: Record, where: str, reserve: int) -> tuple[str, list[int]]:
        """`(text, ids)` of the prompt alone, shortened so that `reserve` more tokens fit into `length`."""

        ids, cut = self.prompt_ids(record, where, reserve)
        return self.renderer.prompt(record, where, cut), ids

    def prompt_ids(self, record: Record, where: str, reserve: int) -> tuple[list[int], str | None]:
        """`(ids, cut)` of the prompt alone, as `prompt`; `cut` is what is left of its long text, or None for all."""

        def build(long: str | None) -> Ids:
            return self._encode([(self.renderer.prompt(record, where, long), False)])

        text = functools.partial(self.renderer.long_text, record, where)
        (ids, _), cut = fit(build, self.tokenizer, text, self.length - reserve, where)
        return ids, cut

    def _join(self, pieces: Sequence[Piece], where: str) -> Ids:
        ids, learned = self._encode(pieces)
        if not self.renderer.closed and ids[-1:] != [self.tokenizer.eos_id]:
            ids, learned = [*ids, self.tokenizer.eos_id], [*learned, True]
        if len(ids) < 2:
            raise UserError(f"{where}: the text is a single token, which leaves nothing to predict: use a longer text")
        return ids, learned

    def _encode(self, pieces: Sequence[Piece]) -> Ids:
        return encode_pieces(self.tokenizer, pieces, start=not self.renderer.closed)

    def _shift(self, ids: Sequence[int], learned: Sequence[bool]) -> HostArrays:
        weights = np.where(np.asarray(learned[1:], bool), 1.0, self.prompt_weight)
        answered = np.logical_or.accumulate([False, *learned[1:-1]])
        return {
            "tokens": np.asarray(ids[:-1], np.int32),
            "targets": np.asarray(ids[1:], np.int32),
            "weights": weights.astype(np.float32),
            "prompt": ~answered,
        }


def language_encoder(config: DataConfig, tokenizer: Tokenizer, source: Source) -> LanguageEncoder:
    """The encoder of a config. Raises UserError for a template that does not fit the source."""
    renderer = build_renderer(config, config.template, tokenizer, source)
    transform = build_transform(config, tokenizer)
    length = transform.room if transform else config.seq_len
    return LanguageEncoder(renderer, tokenizer, length, config.prompt_loss_weight)


LANGUAGE = RowFormat(
    name="causal_lm",
    encoder=language_encoder,
    arrays={
        "tokens": TOKENS,
        "targets": TOKENS,
        "weights": ArraySpec("float32", filler=0),
        "prompt": ArraySpec("bool"),
        "positions": INDEX,
        "segments": INDEX,
    },
    packable=True,
)
