"""The text that a model reads of a record, in pieces: parts of the prompt, and parts to be learned."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from lowrank.core.errors import UserError
from lowrank.core.typing import Tokenizer
from lowrank.data import templates
from lowrank.data.config import DataConfig
from lowrank.data.sources import Source
from lowrank.data.templates import MESSAGES, Record, Template

Piece = tuple[str, bool]  # (text, whether it is to be learned)


class Renderer(Protocol):
    """A template or a conversation. `long` takes the place of `long_text(record)` where that is too long.

    A `document` is learned in full and cut into as many sequences as it takes. A `closed` text brings its own end, so
    that no end token is added.
    """

    document: bool
    closed: bool

    def long_text(self, record: Record, where: str) -> str:
        """The part of the record that may be shortened."""

    def pieces(self, record: Record, where: str, long: str | None = None) -> list[Piece]:
        """The whole text in order. Raises UserError naming `where` for a record without a field or an answer."""

    def prompt(self, record: Record, where: str, long: str | None = None) -> str:
        """The text that generation continues."""

    def answer(self, record: Record, where: str) -> str:
        """The reference of a generated text. Raises UserError as `pieces` does, and costs little."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """A template's prompt and completion, joined as they are."""

    template: Template
    closed = False

    @property
    def document(self) -> bool:
        """Whether there is no prompt."""
        return not self.template.prompt

    def long_text(self, record: Record, where: str) -> str:
        """The template's long field."""
        return self.template.long_text(record, where)

    def pieces(self, record: Record, where: str, long: str | None = None) -> list[Piece]:
        """Prompt and completion, or the document alone."""
        prompt, completion = self.template.render(record, where, long)
        return [(prompt, False), (completion, True)] if prompt else [(completion, True)]

    def prompt(self, record: Record, where: str, long: str | None = None) -> str:
        """The prompt."""
        return self.template.render(record, where, long)[0]

    def answer(self, record: Record, where: str) -> str:
        """The completion, without the space around it."""
        return self.template.render(record, where)[1].strip()


@dataclasses.dataclass(frozen=True)
class Chat:
    """Turns as the tokenizer's chat template writes them: a template's two, or those in the record's `messages`.

    Every answer among `messages` is learned, and the longest of the user's turns is the one that is shortened.
    """

    tokenizer: Tokenizer
    template: Template | None = None
    document = False
    closed = True

    def long_text(self, record: Record, where: str) -> str:
        """The template's long field, or the user's longest turn."""
        if self.template:
            return self.template.long_text(record, where)
        messages = _messages(record, where)
        return messages[_longest(messages, where)]["content"]

    def pieces(self, record: Record, where: str, long: str | None = None) -> list[Piece]:
        """The conversation, its answers to be learned."""
        return turns(self.tokenizer, self._turns(record, where, long), where)

    def prompt(self, record: Record, where: str, long: str | None = None) -> str:
        """The conversation up to the last answer, with the template's start of an answer at the end."""
        return _write(self.tokenizer, self._turns(record, where, long)[:-1], where, announce=True)

    def answer(self, record: Record, where: str) -> str:
        """The last answer."""
        return self._turns(record, where, None)[-1]["content"].strip()

    def _turns(self, record: Record, where: str, long: str | None) -> list[dict[str, str]]:
        if self.template:
            prompt, completion = self.template.render(record, where, long)
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        messages = _messages(record, where)
        if long is not None:
            at = _longest(messages, where)
            messages[at] = {**messages[at], "content": long}
        return messages


def build_renderer(config: DataConfig, template: str, tokenizer: Tokenizer, source: Source) -> Renderer:
    """The renderer of a config whose template has this name. Raises UserError where it does not fit the source."""
    resolved = templates.resolve(template, config.completion, config.truncate, config.chat, source.fields, source.name)
    return Plain(resolved) if resolved and not resolved.chat else Chat(tokenizer, resolved)


def _messages(record: Record, where: str) -> list[dict[str, str]]:
    """The record's messages. Raises UserError unless roles and contents are text and the last turn is an answer."""
    if MESSAGES not in record:
        raise UserError(f"{where}: the record has no field {MESSAGES!r}")
    messages = record[MESSAGES]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {MESSAGES} must be a list of turns, each with a role and a content")
    for turn in messages:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: each turn of {MESSAGES} needs a role and a content, and both must be text")
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise UserError(f"{where}: empty completion")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise UserError(f"{where}: {MESSAGES} must end with an assistant's turn that answers another turn")
    return [dict(turn) for turn in messages]


def _longest(messages: Sequence[dict[str, str]], where: str) -> int:
    user = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if not user:
        raise UserError(f"{where}: {MESSAGES} needs a turn of the user")
    return max(user, key=lambda i: len(messages[i]["content"]))


def turns(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], where: str) -> list[Piece]:
    """The conversation as the tokenizer's chat template writes it, with the assistant's turns to be learned.

    A template may write an earlier turn differently once others follow (some drop its reasoning); such a turn counts
    as part of the prompt. The last turn is always learned. Raises UserError where the template does not write the last
    answer after its prompt.
    """
    full = _write(tokenizer, messages, where)
    pieces, end = [], 0
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant" or not i:
            continue
        before = _write(tokenizer, messages[:i], where, announce=True)
        through = _write(tokenizer, messages[: i + 1], where) if i + 1 < len(messages) else full
        if full.startswith(through) and through.startswith(before) and len(before) < len(through):
            pieces += [(full[end : len(before)], False), (through[len(before) :], True)]
            end = len(through)
    if end != len(full):
        raise UserError(
            f"{where}: the chat template does not write the last answer after its prompt: use another template"
        )
    return pieces


def _write(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], where: str, announce: bool = False) -> str:
    try:
        return tokenizer.chat(list(messages), add_generation_prompt=announce)
    except UserError as e:  # there is no template, or it refuses these turns
        raise UserError(f"{where}: {e}") from None
