"""Rows of prompts whose texts the model writes itself, several of each prompt. Shapes: N tokens of one prompt.

A record has a `prompt`, text or a list of turns, or the fields of `data.template`. It needs no answer; one that it has
is the reference of the texts of an evaluation.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank.core.errors import UserError, plural
from lowrank.core.typing import Tokenizer
from lowrank.data import templates
from lowrank.data.chat import Chat
from lowrank.data.config import DataConfig
from lowrank.data.conversations import CONVERSATIONS, is_turns
from lowrank.data.language import LANGUAGE, LanguageEncoder
from lowrank.data.render import Plain, Renderer
from lowrank.data.row_format import RECORD, ArraySpec, EncodedSequence, RowFormat
from lowrank.data.sources import Source
from lowrank.data.templates import Record

PROMPT, ANSWER = "prompt", "completion"
NO_TEXT = "-"  # in the place of the answer of a record without one


@dataclasses.dataclass(frozen=True)
class PromptEncoder(LanguageEncoder):
    """The prompt alone, of at most `length - max_new` tokens, and zeros for what is known when texts are written."""

    max_new: int = 1
    arrays: Mapping[str, ArraySpec] = dataclasses.field(default_factory=dict)
    turns: bool = False  # whether an answer is a list of turns
    referenced: bool = False  # whether records have answers

    def __call__(self, record: Record, where: str) -> tuple[list[EncodedSequence], bool]:
        """`([sequence], whether the prompt was shortened)`. Raises UserError naming `where`."""
        ids, cut = self.prompt_ids(self.answered(record), where, self.max_new)
        if not ids or not self.renderer.prompt(self.answered(record), where).strip():
            raise UserError(f"{where}: the prompt is empty, so that there is nothing to continue")
        row: dict[str, np.ndarray] = {"tokens": np.asarray(ids, np.int32), "prompt": np.ones(len(ids), bool)}
        for name, spec in self.arrays.items():
            if name not in (*row, RECORD, "positions", "segments"):  # which the loader makes
                row[name] = np.zeros(len(ids) if spec.per_token else (), spec.dtype)
        return [row], cut is not None

    def answered(self, record: Record) -> Record:
        """The record with an answer."""
        if self.referenced or ANSWER in record:
            return record
        return {**record, ANSWER: [{"role": "assistant", "content": NO_TEXT}] if self.turns else NO_TEXT}

    def count(self, sequence: EncodedSequence) -> dict[str, int]:
        """Nothing: no token of a prompt is learned."""
        del sequence
        return {}

    def show(self, sequence: EncodedSequence) -> str:
        """The text of a prompt."""
        assert isinstance(sequence, dict)
        return self.tokenizer.decode(sequence["tokens"].tolist(), special=True)

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks a field; nothing is encoded."""
        self.renderer.prompt(self.answered(record), where)

    def example(self, record: Record, where: str, reserve: int) -> dict[str, Any]:
        """As for language modeling; the completion is empty for a record without an answer."""
        found = super().example(self.answered(record), where, reserve)
        return found if self.referenced else {**found, "completion": ""}


def prompt_rows(name: str, copies: int, max_new: int, arrays: Mapping[str, ArraySpec]) -> RowFormat:
    """Rows with `copies` of each prompt next to each other, with space for texts of up to `max_new` tokens.

    They have the arrays of language modeling, the record's number and `arrays`, in which the loader leaves zeros.
    """
    arrays = {**LANGUAGE.arrays, RECORD: ArraySpec("int32", per_token=False), **arrays}
    encoder = functools.partial(_encoder, copies, max_new, arrays)
    return RowFormat(name=name, encoder=encoder, arrays=arrays, copies=copies)


def _encoder(
    copies: int,
    max_new: int,
    arrays: Mapping[str, ArraySpec],
    config: DataConfig,
    tokenizer: Tokenizer,
    source: Source,
) -> PromptEncoder:
    """The encoder of a config. Raises UserError for groups, lengths, a template or fields that do not fit."""
    if config.batch_size % copies:
        raise UserError(
            f"data.batch_size={config.batch_size} counts texts, and is not divisible by the {copies} of each prompt: "
            f"use a multiple of {copies}"
        )
    if max_new >= config.seq_len:
        room = f"data.seq_len={config.seq_len} holds a prompt and its text of up to {plural(max_new, 'token')}"
        raise UserError(f"{room}: raise it, or lower objective.max_new")
    turns = is_turns(source[0].get(PROMPT))
    renderer = _renderer(config, tokenizer, source, turns)
    template = renderer.template if isinstance(renderer, Plain | Chat) else None
    fields = [field for _, field in templates.parse(template.completion)] if template else [ANSWER] * turns
    referenced = ANSWER not in fields or ANSWER in source.fields
    return PromptEncoder(
        renderer, tokenizer, config.seq_len, 0.0, max_new=max_new, arrays=arrays, turns=turns, referenced=referenced
    )


def _renderer(config: DataConfig, tokenizer: Tokenizer, source: Source, turns: bool) -> Renderer:
    """The renderer of a config, whose answer may be missing. Raises UserError for a template without a prompt."""
    name = config.template
    if name == templates.AUTO and PROMPT in source.fields:
        name = "turns" if turns else "plain"
    elif name == templates.AUTO:
        name = templates.automatic(source.fields, source.name, source[0])
    completion = config.completion or (f"{{{ANSWER}}}" if "{" in name else "")
    fields = tuple(dict.fromkeys((*source.fields, ANSWER)))
    template = templates.resolve(name, completion, config.truncate, config.chat, fields, source.name)
    if template is None:
        return Chat(tokenizer, form=CONVERSATIONS[name])
    if not template.prompt:
        raise UserError(f"data.template={name} has no prompt for the model to continue: choose a template that has one")
    return Chat(tokenizer, template) if template.chat else Plain(template)
