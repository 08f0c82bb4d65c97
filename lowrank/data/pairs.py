"""Rows of preferences: the chosen and the rejected answer to one prompt, which are the two members of a row.

A record has `chosen` and `rejected`, and mostly a `prompt`; each is text or a list of turns. Without a prompt of the
same kind, what both answers start with is the prompt. Shapes: N tokens of one sequence.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError, nearest
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data import templates
from lowrank.data.chat import Chat
from lowrank.data.config import DataConfig
from lowrank.data.conversations import CONVERSATIONS, is_turns
from lowrank.data.encode import Ids, fit
from lowrank.data.language import LANGUAGE, LanguageEncoder
from lowrank.data.render import Plain, Renderer
from lowrank.data.row_format import INDEX, RECORD, TOKENS, ArraySpec, EncodedSequence, RowFormat
from lowrank.data.sources import Source
from lowrank.data.templates import Record

PROMPT, ANSWER, ANSWERS = "prompt", "completion", ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PairEncoder(LanguageEncoder):
    """A pair of sequences for next-token prediction; answers weigh 1 and the prompt 0.

    The prompt is cut once, so that the longer answer fits, and is the same for both. `implicit` says that the records
    have no prompt of their own.
    """

    implicit: bool = False

    @property
    def room(self) -> int:
        """The ids of a sequence that fit into a row: the last one is a target only."""
        return self.length + 1

    def __call__(self, record: Record, where: str) -> tuple[list[EncodedSequence], bool]:
        """`([(chosen, rejected)], whether the prompt was shortened)`. Raises UserError naming `where`."""
        whole = answered = self.answered(record, where)
        places = _places(where)
        while None not in (shorter := list(map(self.renderer.without_oldest, answered, places))):
            if max(len(ids) for ids, _ in self._both(answered, where)) <= self.room:
                break
            answered = [one for one in shorter if one is not None]

        def longer(long: str | None) -> Ids:
            return max(self._both(answered, where, long), key=lambda encoded: len(encoded[0]))

        text = functools.partial(self.renderer.long_text, answered[0], where)
        _, cut = fit(longer, self.tokenizer, text, self.room, where)
        encoded = self._both(answered, where, cut)
        if encoded[0] == encoded[1]:
            raise UserError(f"{where}: chosen and rejected are the same answer")
        return [tuple(self.member(*one, record, where) for one in encoded)], cut is not None or answered is not whole

    def member(self, ids: Sequence[int], learned: Sequence[bool], record: Record, where: str) -> HostArrays:
        """The arrays of one answer."""
        del record, where
        return self._shift(ids, learned)

    def answered(self, record: Record, where: str) -> list[Record]:
        """The record with `prompt` and `completion`, once for each answer. Raises UserError for one that lacks them."""
        for field in ANSWERS:
            if field not in record:
                raise UserError(f"{where}: the record has no field {field!r}{nearest(field, record)}")
        chosen, rejected = (record[field] for field in ANSWERS)
        if is_turns(chosen) != is_turns(rejected):
            raise UserError(f"{where}: chosen and rejected must both be text, or both be turns")
        if chosen == rejected:
            raise UserError(f"{where}: chosen and rejected are the same answer")
        if self.implicit or is_turns(chosen) != is_turns(record.get(PROMPT, chosen)):
            size = _common(chosen, rejected, where)
            parts = {PROMPT: chosen[:size]}, chosen[size:], rejected[size:]
        else:
            parts = {}, chosen, rejected
        prompt, *answers = parts
        return [{**record, **prompt, ANSWER: answer} for answer in answers]

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks an answer; nothing is encoded."""
        for one, place in zip(self.answered(record, where), _places(where), strict=True):
            self.renderer.answer(one, place)

    def example(self, record: Record, where: str, reserve: int) -> dict[str, Any]:
        """That of the chosen answer."""
        return super().example(self.answered(record, where)[0], where, reserve)

    def _both(self, answered: Sequence[Record], where: str, long: str | None = None) -> list[Ids]:
        both = zip(answered, _places(where), strict=True)
        return [self._join(self.renderer.pieces(one, place, long), place) for one, place in both]


@dataclasses.dataclass(frozen=True)
class ScoredEncoder(PairEncoder):
    """A pair of whole sequences for a model of rewards, `tokens` int32 `[N]`, and the record's `margin` float32."""

    @property
    def room(self) -> int:
        """The ids of a sequence that fit into a row."""
        return self.length

    def member(self, ids: Sequence[int], learned: Sequence[bool], record: Record, where: str) -> HostArrays:
        """The arrays of one answer. Raises UserError for a margin that is not a number."""
        del learned
        margin = record.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not np.isfinite(margin):
            raise UserError(f"{where}: margin must be a finite number, not {margin!r}")
        return {"tokens": np.asarray(ids, np.int32), "margin": np.float32(margin)}

    def count(self, sequence: EncodedSequence) -> dict[str, int]:
        """Nothing: no token is learned."""
        del sequence
        return {}

    def show(self, sequence: EncodedSequence) -> str:
        """The text of a sequence."""
        assert isinstance(sequence, dict)
        return self.tokenizer.decode(sequence["tokens"].tolist(), special=True)


def _places(where: str) -> list[str]:
    """The places of the two answers, for a reader."""
    return [f"{where}: {field}" for field in ANSWERS]


def _common(chosen: Any, rejected: Any, where: str) -> int:
    """How many turns, or characters, both answers start with; of a text, a space before the answers is theirs."""
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    size = next(differ, min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and chosen[:size].endswith(" "):
        size -= 1
    if not chosen[:size]:
        raise UserError(f"{where}: the record has no prompt, and chosen and rejected start with nothing in common")
    return size


def answer_renderer(config: DataConfig, tokenizer: Tokenizer, source: Source, turns: bool) -> Renderer:
    """The renderer of records that have a `prompt` and a `completion`, text or `turns`.

    Raises UserError for a template whose completion is not that field, and as `templates.resolve` does.
    """
    name = ("turns" if turns else "plain") if config.template == templates.AUTO else config.template
    fields = tuple(dict.fromkeys((*source.fields, PROMPT, ANSWER)))
    completion = config.completion or (f"{{{ANSWER}}}" if "{" in name else "")
    template = templates.resolve(name, completion, config.truncate, config.chat, fields, source.name)
    if template is None:
        if name != "turns":
            raise UserError(f"data.template={name} holds whole conversations: set it to turns, plain or chat")
        return Chat(tokenizer, form=CONVERSATIONS[name])
    if not template.prompt or ANSWER not in [field for _, field in templates.parse(template.completion)]:
        raise UserError(f"data.template={name}: its completion must have the field {{{ANSWER}}}, after a prompt")
    return Chat(tokenizer, template) if template.chat else Plain(template)


def _encoder(kind: type[PairEncoder], config: DataConfig, tokenizer: Tokenizer, source: Source) -> PairEncoder:
    for field in ANSWERS:
        if field not in source.fields:
            found = ", ".join(sorted(source.fields))
            raise UserError(
                f"{source.name} holds no pairs: the field {field!r} is missing{nearest(field, source.fields)}; "
                f"its fields: {found}"
            )
    renderer = answer_renderer(config, tokenizer, source, is_turns(source[0].get("chosen")))
    needs = renderer.template.fields if isinstance(renderer, Plain | Chat) and renderer.template else (PROMPT,)
    implicit = PROMPT in needs and PROMPT not in source.fields
    return kind(renderer, tokenizer, config.seq_len, prompt_weight=0.0, implicit=implicit)


PAIRS = RowFormat(
    name="preference",
    encoder=functools.partial(_encoder, PairEncoder),
    arrays={**LANGUAGE.arrays, RECORD: ArraySpec("int32", per_token=False)},
    members=2,
)
SCORED_PAIRS = RowFormat(
    name="reward",
    encoder=functools.partial(_encoder, ScoredEncoder),
    arrays={"tokens": TOKENS, "segments": INDEX, "margin": ArraySpec("float32", per_token=False)},
    members=2,
)
