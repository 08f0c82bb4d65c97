"""Chat templates as transformers renders them: https://huggingface.co/docs/transformers/chat_templating.

A template is Jinja in a sandbox. Its variables are the messages, what a record brings beside them (`tools`,
`documents`), and the special tokens of the tokenizer. `{% generation %}` marks what an assistant wrote.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from lowrank.core.errors import UserError, unknown

BEGIN, END = "\ufdd0", "\ufdd1"  # around what is generated while a template renders; Unicode keeps them from texts
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
    try:
        text = _compile(template).render(messages=messages, **variables)
    except Exception as e:  # a template is a program: whatever it does wrong is its fault
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"the chat template cannot render these messages: {reason}") from None
    return _without_marks(text)


def _without_marks(text: str) -> Rendered:
    parts, spans, size, start = [], [], 0, 0
    for i, part in enumerate(text.replace(END, BEGIN).split(BEGIN)):
        parts.append(part)
        start, size = size, size + len(part)
        if i % 2:
            spans.append((start, size))
    return Rendered("".join(parts), spans)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, whose text is marked."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.CallBlock:
        """A call of `_mark` with the text between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
