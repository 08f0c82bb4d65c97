"""CSV and TSV files: the first line names the fields, and every value is text."""

import csv
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lowrank.core.errors import UserError, plural
from lowrank.data.file_source import RecordFiles
from lowrank.data.templates import Record
from lowrank.data.text_file import Chunk, TextFile

csv.field_size_limit(1 << 30)  # a document may be one value


def open_csv(path: Path, delimiter: str) -> TextFile:
    """A file whose values are quoted as in RFC 4180, so that a value may hold line breaks.

    Raises UserError for a file without names of fields, with the same name twice, and for a record with more or fewer
    values than names.
    """
    with path.open("rb") as file:
        header = next(_rows(file, path, delimiter), None)
    fields = _values(header[2], f"{path}:{header[0]}", delimiter) if header else []
    if not any(fields):
        raise UserError(f"{path} has no first line with the names of the fields")
    if twice := next((name for i, name in enumerate(fields) if name in fields[:i]), None):
        raise UserError(f"{path}:1: the field {twice!r} is there twice")

    def split(file: BinaryIO, path: Path) -> Iterator[Chunk]:
        chunks = _rows(file, path, delimiter)
        next(chunks)
        return chunks

    return TextFile(path, split, functools.partial(_record, fields=fields, delimiter=delimiter))


def _rows(file: BinaryIO, path: Path, delimiter: str) -> Iterator[Chunk]:
    """The bytes of each record, of which Python's reader says how many lines it takes."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        for line in file:
            taken.append(line)
            yield line.decode("latin-1")  # a quote and a delimiter are the same bytes as in UTF-8

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    number, offset = 1, 0
    try:
        for row in reader:
            chunk = b"".join(taken)
            taken.clear()
            if row:
                yield number, offset, chunk
            number, offset = reader.line_num + 1, offset + len(chunk)
    except csv.Error as e:
        raise UserError(f"{path}:{number}: the record cannot be read as {delimiter!r}-separated values: {e}") from None


def _values(chunk: bytes, where: str, delimiter: str) -> list[str]:
    try:
        text = chunk.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: the record is not UTF-8: {e.reason} at byte {e.start}") from None
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))


def _record(chunk: bytes, where: str, fields: list[str], delimiter: str) -> Record:
    row = _values(chunk, where, delimiter)
    if len(row) != len(fields):
        values = plural(len(row), "value")
        raise UserError(f"{where}: {values} for {plural(len(fields), 'field')}: quote a value that holds {delimiter!r}")
    return dict(zip(fields, row, strict=True))


CSV = RecordFiles("csv", ".csv", lambda path: open_csv(path, ","))
TSV = RecordFiles("tsv", ".tsv", lambda path: open_csv(path, "\t"))
