"""The text that a model reads of a record, in pieces: parts of the prompt, and parts to be learned."""

import dataclasses
from typing import Protocol

from lowrank.core.typing import Tokenizer
from lowrank.data import templates
from lowrank.data.chat import Chat, Piece
from lowrank.data.config import DataConfig
from lowrank.data.conversations import CONVERSATIONS
from lowrank.data.sources import Source
from lowrank.data.templates import Record, Template


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

    def without_oldest(self, record: Record, where: str) -> Record | None:
        """A conversation without its oldest exchange; None where nothing can be left out."""

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

    def without_oldest(self, record: Record, where: str) -> Record | None:
        """None: a text has no turns."""
        return None

    def answer(self, record: Record, where: str) -> str:
        """The completion, without the space around it."""
        return self.template.render(record, where)[1].strip()


def build_renderer(config: DataConfig, template: str, tokenizer: Tokenizer, source: Source) -> Renderer:
    """The renderer of a config whose template has this name. Raises UserError where it does not fit the source."""
    name = templates.automatic(source.fields, source.name, source[0]) if template == templates.AUTO else template
    resolved = templates.resolve(name, config.completion, config.truncate, config.chat, source.fields, source.name)
    if resolved and not resolved.chat:
        return Plain(resolved)
    return Chat(tokenizer, resolved) if resolved else Chat(tokenizer, form=CONVERSATIONS[name])
