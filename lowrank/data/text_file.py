"""A text file whose records are read in any order: one pass finds and checks them, and the file stays open."""

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lowrank.core.errors import UserError
from lowrank.data.templates import Record

Chunk = tuple[int, int, bytes]  # the number of a record's first line, its offset in the file, and its bytes
Parse = Callable[[bytes, str], Record]  # (bytes, place) -> record; raises UserError naming the place


class TextFile:
    """The records of a file that `split` cuts into chunks and `parse` reads. A file that takes the name is not read.

    Raises UserError for a record that cannot be read, and, later, for a file that has been written to.
    """

    def __init__(self, path: Path, split: Callable[[BinaryIO, Path], Iterator[Chunk]], parse: Parse) -> None:
        self.path, self._parse = path, parse
        fields: dict[str, None] = {}
        places = []
        self._file = open(path, "rb")  # noqa: SIM115 (closed with the object)
        self._stamp = self._written()
        for number, offset, chunk in split(self._file, path):
            fields.update(dict.fromkeys(parse(chunk, f"{path}:{number}")))
            places.append((number, offset, offset + len(chunk)))
        self._places = np.asarray(places, np.int64).reshape(-1, 3)
        self.checksum = checksum(self._file)
        self.fields, self.num_examples = tuple(fields), len(places)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, i: int) -> Record:
        """One record."""
        _, begin, end = self._places[i].tolist()
        chunk = os.pread(self._file.fileno(), end - begin, begin)
        if self._written() != self._stamp:
            raise UserError(f"{self.path} has changed since the run began: start again, in another workdir")
        return self._parse(chunk, self.where(i))

    def where(self, i: int) -> str:
        """`PATH:LINE`."""
        return f"{self.path}:{self._places[i, 0]}"

    def _written(self) -> tuple[int, int]:
        """The time at which the file was last written, and its size."""
        about = os.fstat(self._file.fileno())
        return about.st_mtime_ns, about.st_size


def checksum(file: BinaryIO) -> int:
    """The CRC-32 of a file from its start."""
    file.seek(0)
    total = 0
    while block := file.read(1 << 20):
        total = zlib.crc32(block, total)
    return total
