"""Prompt templates: a record's fields become a prompt and a completion.

A template is named, or written out: `{field}` stands for the record's field, `{{` and `}}` for braces. Prompt and
completion are joined as they are, so the space between them belongs to one of them: ` {title}`.
"""

import dataclasses
import math
import string
from collections.abc import Iterable, Sequence

from lowrank.core.errors import UserError, nearest, unknown
from lowrank.data.conversations import CONVERSATIONS, Record, is_turns


def parse(text: str) -> list[tuple[str, str | None]]:
    """`[(literal, field or None), ...]` of a format string. Raises UserError for one that is malformed."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as e:
        raise UserError(f"template {text!r}: {e}") from None
    for _, field, spec, conversion in parts:
        if field == "" or spec or conversion:
            raise UserError(
                f"template {text!r}: a field is written {{name}}, without an index, a format or a conversion"
            )
    return [(literal, field) for literal, field, _, _ in parts]


def fill(text: str, record: Record, where: str) -> str:
    """The format string with the record's values in place of its fields; braces inside a value stay as they are."""
    return "".join(part + (value(record, field, where) if field else "") for part, field in parse(text))


def value(record: Record, field: str, where: str) -> str:
    """One field as text: a string, a number, or the first item of a list. Raises UserError for any other value."""
    if field not in record:
        raise UserError(f"{where}: the record has no field {field!r}{nearest(field, record)}")
    found = record[field]
    if isinstance(found, list | tuple):
        found = found[0] if len(found) else ""
    if isinstance(found, str):
        return found
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise UserError(f"{where}: field {field!r} is {type(found).__name__}, not text")
    if not math.isfinite(found):
        raise UserError(f"{where}: field {field!r} is {found}, not text: a missing value?")
    return str(found)


@dataclasses.dataclass(frozen=True)
class Template:
    """`prompt` and `completion` as format strings; without a prompt the completion is a document, learned in full.

    `long` names the field whose end is cut when a record does not fit (a document is not cut). With `chat`, prompt and
    completion are one turn each of the tokenizer's chat template. `blank` is `(field, prompt)`: the prompt for records
    in which that field is missing or empty.
    """

    prompt: str
    completion: str
    long: str = ""
    chat: bool = False
    blank: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.long and self.long not in self.fields:
            raise unknown("template field", self.long, self.fields)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the template needs, in order of appearance."""
        found = [field for text in (self.prompt, self.completion) for _, field in parse(text) if field]
        return tuple(dict.fromkeys(found))

    def render(self, record: Record, where: str, long: str | None = None) -> tuple[str, str]:
        """`(prompt, completion)`, with `long` in place of the long field.

        Raises UserError naming `where` when a field is missing or is not text, or the completion is empty.
        """
        prompt = self.blank[1] if self._is_blank(record) else self.prompt
        if long is not None:
            record = {**record, self.long: long}
        completion = fill(self.completion, record, where)
        if long != "" and not completion.strip():
            raise UserError(f"{where}: empty {'completion' if self.prompt else 'text'}")
        return fill(prompt, record, where), completion

    def long_text(self, record: Record, where: str) -> str:
        """The text of the long field; empty when no field may be shortened."""
        if not self.long or (self._is_blank(record) and self.blank[0] == self.long):
            return ""
        return value(record, self.long, where)

    def _is_blank(self, record: Record) -> bool:
        return self.blank is not None and not str(record.get(self.blank[0]) or "").strip()


_RESPONSE = "### Response:\n"
_TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_INSTRUCTION = "\n\n### Instruction:\n{instruction}\n\n"

TEMPLATES: dict[str, Template] = {
    "plain": Template("{prompt}", "{completion}", long="prompt"),
    "headline": Template("{text}\n\nHeadline:", " {title}", long="text"),
    "instruction": Template("### Instruction:\n{prompt}\n\n" + _RESPONSE, "{completion}", long="prompt"),
    "alpaca": Template(
        _TASK.format(", paired with an input that provides further context")
        + f"{_INSTRUCTION}### Input:\n{{input}}\n\n{_RESPONSE}",
        "{output}",
        long="input",
        blank=("input", _TASK.format("") + _INSTRUCTION + _RESPONSE),
    ),
    "chat": Template("{prompt}", "{completion}", long="prompt", chat=True),
    "text": Template("", "{text}", long="text"),
}
AUTO = "auto"


def resolve(name: str, completion: str, long: str, chat: bool, fields: Sequence[str], source: str) -> Template | None:
    """The template that a config asks for, or None for one of CONVERSATIONS.

    `name` is one of `TEMPLATES` or `CONVERSATIONS`, `auto` (chosen by the fields) or a prompt with `{field}`s,
    to which `completion` belongs. A prompt without a completion is a document. Raises UserError for an unknown
    template, and for one with a field that `source` lacks.
    """
    name = automatic(fields, source) if name == AUTO else name
    optional: Sequence[str] = ()
    if name in CONVERSATIONS:
        template, needed = None, CONVERSATIONS[name].fields
    else:
        template = _written(name, completion, long) if "{" in name else _named(name, completion, long)
        template = dataclasses.replace(template, chat=template.chat or chat)
        needed, optional = template.fields, template.blank[:1] if template.blank else ()
    for field in needed:
        if field not in fields and field not in optional:
            raise UserError(f"template field {field!r} is not in {source}{nearest(field, fields)}; {_has(fields)}")
    return template


def automatic(fields: Iterable[str], source: str, first: Record | None = None) -> str:
    """The name of the template that fits the fields: of several, the one that uses the most of them.

    Whether a prompt is text or turns is that of the `first` record.
    """
    wants = {"messages": "messages", "conversations": "conversations"}
    wants |= {"turns" if first and is_turns(first.get("prompt")) else "plain": "prompt completion"}
    wants |= {"alpaca": "instruction output", "headline": "text title", "text": "text"}
    for name, needed in wants.items():
        if set(needed.split()) <= set(fields):
            return name
    raise UserError(f"none of the templates fits {source}: set data.template; {_has(fields)}")


def _has(fields: Iterable[str]) -> str:
    return f"its fields: {', '.join(sorted(fields)) or 'none'}"


def _named(name: str, completion: str, long: str) -> Template:
    if name not in TEMPLATES:
        raise unknown("template", name, [*TEMPLATES, *CONVERSATIONS, AUTO])
    template = TEMPLATES[name]
    completion = completion or template.completion
    return dataclasses.replace(template, completion=completion, long=long or template.long)


def _written(prompt: str, completion: str, long: str) -> Template:
    found = [field for _, field in parse(prompt) if field]
    long = long or ("text" if "text" in found else found[-1] if found else "")
    return Template(prompt, completion, long=long) if completion else Template("", prompt, long=long)
