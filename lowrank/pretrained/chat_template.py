"""Chat templates as transformers renders them: https://huggingface.co/docs/transformers/chat_templating.

A template is Jinja in a sandbox, in a process apart (`template_process`). Its variables are the messages, what a record
brings beside them (`tools`, `documents`), and the special tokens of the tokenizer. `{% generation %}` marks what an
assistant wrote.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lowrank.core.errors import UserError, unknown
from lowrank.pretrained import template_process
from lowrank.pretrained.template_worker import BEGIN, END

DEFAULT, TOOLS = "default", "tool_use"  # the names of templates where there are several

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # the characters from the first up to the second


class Rendered(NamedTuple):
    """The text of a conversation, and the characters of it that the template marks as generated."""

    text: str
    generated: list[Span]


def select_template(templates: Any, tools: Any) -> str:
    """The template of a `tokenizer_config.json`: one text, or of several by name the one for tools or the default.

    Raises UserError where there is none, and where it is not text.
    """
    if isinstance(templates, list):
        if not all(isinstance(t, Mapping) and {"name", "template"} <= set(t) for t in templates):
            raise UserError("chat_template is a list whose items are not all {name, template}")
        named = {t["name"]: t["template"] for t in templates}
        name = TOOLS if tools and TOOLS in named else DEFAULT
        if name not in named:
            raise unknown("chat template", name, named)
        templates = named[name]
    if not templates:
        raise UserError("the tokenizer has no chat template, which conversations need")
    if not isinstance(templates, str):
        raise UserError(f"chat_template is {type(templates).__name__}, not text")
    return templates


def render(template: str, messages: Messages, **variables: Any) -> Rendered:
    """The messages as the template writes them. Raises UserError where it refuses them or fails."""
    return _without_marks(template_process.render(template, {"messages": [dict(m) for m in messages], **variables}))


def _without_marks(text: str) -> Rendered:
    parts, spans, size, start = [], [], 0, 0
    for i, part in enumerate(text.replace(END, BEGIN).split(BEGIN)):
        parts.append(part)
        start, size = size, size + len(part)
        if i % 2:
            spans.append((start, size))
    return Rendered("".join(parts), spans)
