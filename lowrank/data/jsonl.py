"""Records in JSONL files: one JSON object per line, indexed in one pass and read in any order."""

import functools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lowrank.core.errors import UserError, nearest
from lowrank.core.files import parse_json
from lowrank.core.paths import as_local_path

Record = Mapping[str, Any]
_SURROGATE = re.compile("[\ud800-\udfff]")


class Jsonl:
    """The records of a file, which is the split `train`, or of a folder, whose `*.jsonl` files are its splits.

    Every line of a split in use is checked: a line that is not a JSON object raises UserError with its number.
    """

    typed = False

    def __init__(self, path: str, split: str) -> None:
        self.name = f"jsonl:{path} ({split})"
        self._files = files = _Files(as_local_path(path))
        try:
            parts = tfds.core.splits.AbstractSplit.from_spec(split).to_absolute(files)
        except UserError:  # a line of the file
            raise
        except (ValueError, NotImplementedError) as e:
            raise bad_split(f"jsonl:{path}", split, files, e) from None
        self._parts = [(files[p.splitname], p.from_ or 0, p.to) for p in parts]
        self._lengths = [len(range(scan.num_examples)[begin:end]) for scan, begin, end in self._parts]
        self.fields = tuple(dict.fromkeys(field for scan, _, _ in self._parts for field in scan.fields))
        self.identity = f"jsonl {split} " + " ".join(f"{scan.checksum:08x}" for scan, _, _ in self._parts)

    def __len__(self) -> int:
        return sum(self._lengths)

    def __getitem__(self, index: int) -> Record:
        scan, i = self._at(index)
        return scan.read(i)

    def where(self, index: int) -> str:
        """`PATH:LINE` of a record."""
        scan, i = self._at(index)
        return scan.where(i)

    def labels(self, field: str) -> tuple[str, ...]:
        """The sorted values of `field` in all files together, so that every split and slice has the same labels."""
        records = (scan.read(i) for scan in self._files.values() for i in range(scan.num_examples))
        found = {r[field] for r in records if isinstance(r.get(field), str | int)}
        return tuple(str(x) for x in sorted(found, key=lambda x: (isinstance(x, str), x)))

    def _at(self, index: int) -> tuple["_Scan", int]:
        for (scan, begin, _), length in zip(self._parts, self._lengths, strict=True):
            if index < length:
                return scan, begin + index
            index -= length
        raise IndexError(index)


class _Files(Mapping[str, "_Scan"]):
    """Split name -> its file, which is scanned at its first use."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            close = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
            raise UserError(f"{path} does not exist{close}: set data.source to jsonl: and the path of a file or folder")
        self._paths = {p.stem: p for p in sorted(path.glob("*.jsonl"))} if path.is_dir() else {"train": path}
        if not self._paths:
            raise UserError(f"{path} holds no *.jsonl files: each split is a file SPLIT.jsonl")
        self._scan = functools.cache(_Scan)

    def __getitem__(self, name: str) -> "_Scan":
        return self._scan(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths


class _Scan:
    """One pass over a file: the offsets and fields of its records, and the check that each is a JSON object.

    The file stays open, so that one that takes its name later is not read in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checksum = path, 0
        fields: dict[str, None] = {}
        lines, offsets, offset = [], [], 0
        self._file = open(path, "rb")  # noqa: SIM115 (closed with the object)
        self._stamp = self._written()
        for number, line in enumerate(self._file, 1):
            if line.strip():
                fields.update(dict.fromkeys(_object(line, f"{path}:{number}")))
                lines.append(number)
                offsets.append((offset, offset + len(line)))
            self.checksum = zlib.crc32(line, self.checksum)
            offset += len(line)
        self._lines, self._offsets = np.asarray(lines, np.int64), np.asarray(offsets, np.int64)
        self.fields, self.num_examples = tuple(fields), len(lines)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, i: int) -> Record:
        begin, end = self._offsets[i].tolist()
        line = os.pread(self._file.fileno(), end - begin, begin)
        if self._written() != self._stamp:
            raise UserError(f"{self.path} has changed since the run began: start again, in another workdir")
        return _object(line, self.where(i))

    def where(self, i: int) -> str:
        return f"{self.path}:{self._lines[i]}"

    def _written(self) -> tuple[int, int]:
        """The time at which the file was last written, and its size."""
        about = os.fstat(self._file.fileno())
        return about.st_mtime_ns, about.st_size


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


def bad_split(name: str, split: str, known: Mapping[str, Any], error: Exception) -> UserError:
    """The error for a split expression that names no `known` split, or that TFDS refuses for another reason."""
    reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
    reason = "" if reason.startswith("Unknown split") else f" ({reason})"
    return UserError(f"{name} has no split {split!r}{nearest(split, known)}{reason}; its splits: {', '.join(known)}")
