"""Prompts in a JSONL file, and their texts in another one, which the same command completes after a stop."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lowrank.core import files, paths
from lowrank.core.errors import UserError, nearest
from lowrank.core.paths import PathLike, as_local_path
from lowrank.core.typing import Tokenizer
from lowrank.data.chat import VARIABLES
from lowrank.data.sources import open_source
from lowrank.generation.generate import encode_prompt

PROMPT, MESSAGES, LINE, SETTINGS = "prompt", "messages", "line", "settings"  # fields of records
_START = b'{"line": '  # of a text as it is written, so that no other file is taken for one that a kill has cut


class Prompt(NamedTuple):
    """A record of a file of prompts, which has the field `prompt` or `messages`."""

    where: str  # FILE:LINE
    record: Mapping[str, Any]

    @property
    def line(self) -> int:
        """The number of its line in the file."""
        return int(self.where.rpartition(":")[2])

    @property
    def content(self) -> Any:
        """Its text, or its turns."""
        return self.record.get(PROMPT, self.record.get(MESSAGES))

    def encode(self, tokenizer: Tokenizer, as_chat: bool = False) -> list[int]:
        """The ids that a model continues: turns as the chat template writes them, and with `as_chat` a prompt too."""
        if PROMPT in self.record and not as_chat:
            return encode_prompt(tokenizer, self.record[PROMPT])
        messages = self.record.get(MESSAGES) or [{"role": "user", "content": self.record[PROMPT]}]
        variables = {name: self.record[name] for name in VARIABLES if self.record.get(name) is not None}
        try:
            text = tokenizer.chat(messages, add_generation_prompt=True, **variables)
        except UserError as e:
            raise UserError(f"{self.where}: {e}") from None
        return encode_prompt(tokenizer, text, start=False)


def read_prompts(path: PathLike) -> list[Prompt]:
    """The prompts of a JSONL file. Raises UserError naming the file and the line of a record that is none."""
    path = as_local_path(path)
    if not path.is_file():
        close = nearest(path.name, (p.name for p in paths.children(path.parent)))
        raise UserError(f"{path} is not a file{close}: give a JSONL file with a field 'prompt' or 'messages'")
    source = open_source(f"jsonl:{path}", "train", path.parent)
    prompts = [Prompt(source.where(i), source[i]) for i in range(len(source))]
    if not prompts:
        raise UserError(f"{path} holds no prompts: each line is an object with a field 'prompt' or 'messages'")
    for prompt in prompts:
        _check(prompt)
    return prompts


def _check(prompt: Prompt) -> None:
    record = prompt.record
    if (PROMPT in record) == (MESSAGES in record):
        fields = ", ".join(repr(name) for name in record) or "no field"
        raise UserError(f"{prompt.where}: a prompt has either 'prompt' or {MESSAGES!r}; this record has {fields}")
    if PROMPT in record and not isinstance(record[PROMPT], str):
        raise UserError(f"{prompt.where}: 'prompt' must be text, not {type(record[PROMPT]).__name__}")
    for name in VARIABLES:
        found = record.get(name)
        if found is not None and not (isinstance(found, list) and all(isinstance(item, Mapping) for item in found)):
            raise UserError(f"{prompt.where}: {name!r} must be a list of objects, not {json.dumps(found)[:80]}")
    turns = record.get(MESSAGES, [{"role": "user"}])
    if not isinstance(turns, list) or not turns or not all(isinstance(t, Mapping) and "role" in t for t in turns):
        raise UserError(f"{prompt.where}: {MESSAGES!r} must be a list of turns, each with a role and a content")


class TextFile:
    """The texts that have been written, one JSON object a line: `line`, `prompt`, `text`, `tokens`, `end`, `settings`.

    A text is appended as it ends, and `close` brings all into the order of the prompts.
    """

    def __init__(self, path: PathLike, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> None:
        """Raises UserError for a file of other prompts, of other `settings` or of something else, or in no folder."""
        self.path, self._settings = as_local_path(path), _digest(settings)
        self._texts: dict[int, dict[str, Any]] = {}
        of_line = {prompt.line: prompt for prompt in prompts}
        for number, line in enumerate(self._lines(), 1):
            text = _parse(line)
            if text is None:
                raise UserError(f"{self.path}:{number} is not a text of this command: name another --output")
            prompt = of_line.get(text[LINE])
            if prompt is None or prompt.content != text[PROMPT] or text[SETTINGS] != self._settings:
                differs = "by other settings" if prompt and prompt.content == text[PROMPT] else "for another prompt"
                raise UserError(f"{self.path}:{number} was written {differs}: name another --output, or delete it")
            self._texts[text[LINE]] = text
        if self._texts:
            files.write_text(self.path, "".join(map(_to_line, self._texts.values())))
        self._file: Any = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None
        if not os.access(self.path.parent, os.W_OK):
            raise UserError(f"cannot write {self.path}: its folder cannot be written to")

    @property
    def lines(self) -> frozenset[int]:
        """The lines of the prompts whose texts are there."""
        return frozenset(self._texts)

    def add(self, prompt: Prompt, text: str, tokens: int, end: str) -> None:
        """Appends a text of `tokens` tokens, which ended by a `stop` or at its `length`."""
        found = {LINE: prompt.line, PROMPT: prompt.content, "text": text, "tokens": tokens, "end": end}
        self._texts[prompt.line] = found | {SETTINGS: self._settings}
        try:
            if self._file is None:
                self._file = self.path.open("a" if len(self._texts) > 1 else "w", encoding="utf-8")
            self._file.write(_to_line(self._texts[prompt.line]))
            self._file.flush()
        except OSError as e:  # what is written of the line is left out when the command goes on
            with contextlib.suppress(OSError):  # it tries to write the rest once more
                self._file.close()
            raise UserError(f"cannot write {self.path}: {e.strerror or e}: the same command goes on there") from None

    def close(self) -> None:
        """Writes the texts in the order of their prompts."""
        if self._file is not None:
            self._file.close()
        files.write_text(self.path, "".join(_to_line(self._texts[line]) for line in sorted(self._texts)))

    def _lines(self) -> list[bytes]:
        """The lines of the file if it exists, without a last one that a kill has cut."""
        if not self.path.exists():
            return []
        if not self.path.is_file():
            raise UserError(f"{self.path} is a folder: name a file for the texts as --output")
        *lines, cut = paths.read_bytes(self.path).split(b"\n")
        if not cut.startswith(_START[: len(cut)]):
            raise UserError(f"{self.path}:{len(lines) + 1} is not a text of this command: name another --output")
        return lines


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        text = files.parse_json(line)
    except ValueError:
        return None
    known = isinstance(text, dict) and {LINE, PROMPT, "text", SETTINGS} <= set(text) and isinstance(text[LINE], int)
    return text if known else None


def _to_line(text: Mapping[str, Any]) -> str:
    return json.dumps(text, ensure_ascii=False) + "\n"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files.to_json(settings), sort_keys=True).encode()).hexdigest()[:12]
