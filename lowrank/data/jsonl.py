"""JSONL files: one JSON object per line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lowrank.core.errors import UserError
from lowrank.core.files import parse_json
from lowrank.data.file_source import RecordFiles
from lowrank.data.text_file import Chunk, TextFile

_SURROGATE = re.compile("[\ud800-\udfff]")


def _lines(file: BinaryIO, path: Path) -> Iterator[Chunk]:
    del path
    offset = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, offset, line
        offset += len(line)


def _object(line: bytes, where: str) -> dict[str, Any]:
    """The record of a line. Raises UserError for what is no JSON object and for text that is no Unicode."""
    try:
        record = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: the line is not UTF-8: {e.reason} at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: the line is not JSON: {e.msg} at column {e.colno}") from None
    except ValueError as e:
        raise UserError(f"{where}: the line is JSON beyond what is read: {e}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is a JSON object, not {type(record).__name__}")
    if b"\\u" in line and (half := _SURROGATE.search(json.dumps(record, ensure_ascii=False))):
        code = f"\\u{ord(half[0]):04x}"
        raise UserError(f"{where}: {code} is half of a character: the text was cut in the middle of it")
    return record


JSONL = RecordFiles("jsonl", ".jsonl", lambda path: TextFile(path, _lines, _object))
