"""Records in files: a file, a folder of splits or a pattern, each file read by its kind."""

import dataclasses
import functools
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from lowrank.core.errors import UserError, nearest
from lowrank.core.paths import as_local_path, expand
from lowrank.data.concatenation import Concatenation
from lowrank.data.splits import parse_split
from lowrank.data.templates import Record

_SHARD = re.compile(r"-\d+-of-\d+$")  # the end of the name of one of several files of a split


class OpenFile(Protocol):
    """A checked file. `fields` are the names that occur; `checksum` is that of its bytes."""

    fields: tuple[str, ...]
    num_examples: int
    checksum: int

    def read(self, i: int) -> Record:
        """One record. Raises UserError if the file has changed."""

    def where(self, i: int) -> str:
        """The place of a record."""


@dataclasses.dataclass(frozen=True)
class RecordFiles:
    """A kind of file: its name in a spec, the end of its files' names, and its reader."""

    name: str
    suffix: str
    open: Callable[[Path], OpenFile]  # raises UserError naming the place of a record that cannot be read


class FileSource:
    """The records of files.

    A file, or all the files that a pattern with `*` matches, are the split `train`. The files of a folder are its
    splits: `SPLIT.csv`, or `SPLIT-00000-of-00002.csv` and so on. Every record of a split in use is checked.
    """

    typed = False

    def __init__(self, kind: RecordFiles, path: str, split: str) -> None:
        self.name = f"{kind.name}:{path} ({split})"
        self._splits = _Splits(kind, path)
        parts = parse_split(f"{kind.name}:{path}", split, self._splits)
        self._parts = [(self._splits[part.split], part.begin) for part in parts]
        self._places = Concatenation(part.end - part.begin for part in parts)
        self.fields = tuple(dict.fromkeys(field for files, _ in self._parts for field in files.fields))
        self.identity = f"{kind.name} {split} " + " ".join(files.checksums for files, _ in self._parts)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        file, i = self._at(index)
        return file.read(i)

    def where(self, index: int) -> str:
        """`PATH:LINE` of a record, or `PATH record NUMBER` in a file without lines."""
        file, i = self._at(index)
        return file.where(i)

    def labels(self, field: str) -> tuple[str, ...]:
        """The sorted values of `field` in all files together, so that every split and slice has the same labels."""
        files = [file for split in self._splits.values() for file in split.files]
        records = (file.read(i) for file in files for i in range(file.num_examples))
        found = {r[field] for r in records if isinstance(r.get(field), str | int)}
        return tuple(str(x) for x in sorted(found, key=lambda x: (isinstance(x, str), x)))

    def _at(self, index: int) -> tuple[OpenFile, int]:
        part, i = self._places.find(index)
        files, begin = self._parts[part]
        return files.at(begin + i)


class _Files:
    """The files of one split, one after another."""

    def __init__(self, files: list[OpenFile]) -> None:
        self.files = files
        self._places = Concatenation(file.num_examples for file in files)
        self.num_examples = len(self._places)
        self.fields = tuple(dict.fromkeys(field for file in files for field in file.fields))
        self.checksums = " ".join(f"{file.checksum:08x}" for file in files)

    def at(self, index: int) -> tuple[OpenFile, int]:
        """The file with this record, and its number there."""
        part, i = self._places.find(index)
        return self.files[part], i


class _Splits(Mapping[str, _Files]):
    """Split name -> its files, which are opened at the first use of the split."""

    def __init__(self, kind: RecordFiles, path: str) -> None:
        self._paths = _find(kind, path)
        self._open = functools.cache(lambda name: _Files([kind.open(p) for p in self._paths[name]]))

    def __getitem__(self, name: str) -> _Files:
        return self._open(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths


def _find(kind: RecordFiles, spec: str) -> dict[str, list[Path]]:
    """The paths of each split's files. Raises UserError if there are none."""
    path = as_local_path(spec)
    if path.is_dir():
        splits: dict[str, list[Path]] = {}
        for file in sorted(path.glob(f"*{kind.suffix}")):
            splits.setdefault(_SHARD.sub("", file.stem), []).append(file)
        if not splits:
            raise UserError(f"{path} holds no file *{kind.suffix}: each split is a file SPLIT{kind.suffix}")
        return splits
    if path.exists():
        return {"train": [path]}
    if glob.has_magic(spec):
        files = [Path(file) for file in sorted(glob.glob(expand(spec), recursive=True)) if os.path.isfile(file)]
        if not files:
            raise UserError(f"no file matches {spec}: set data.source to {kind.name}: and a pattern that has matches")
        return {"train": files}
    close = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
    advice = f"set data.source to {kind.name}: and the path of a file or folder"
    raise UserError(f"{path} does not exist{close}: {advice}")
