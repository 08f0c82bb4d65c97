"""A checkpoint that is written a tensor at a time beside its place, resumed after a stop, and renamed when complete."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lowrank.core import files
from lowrank.core.errors import InUse, UserError
from lowrank.merging.blocks import blocks
from lowrank.merging.plan import PlannedTensor
from lowrank.pretrained.export import fill_files
from lowrank.pretrained.hf_files import INDEX, SINGLE

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NUMPY = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ROWS, ABOUT, LOCK = ".rows.jsonl", ".merge.json", ".lock"


class Place(NamedTuple):
    """Where a tensor lies: its file, and the offset of its first byte."""

    file: str
    offset: int
    size: int


def check_new(folder: Path) -> Path:
    """The nearest folder above `folder` that exists. Raises UserError where `folder` cannot be made, or holds files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty directory: name another one")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"cannot write {folder}: {parent} is a file")
    return parent


class Output:
    """The folder in which a merge is written. `rows` are the records of the tensors that are complete."""

    def __init__(self, folder: Path, planned: Sequence[PlannedTensor], dtype: str, shard_bytes: int):
        self.folder, self.dtype = folder, np.dtype(NUMPY[dtype])
        self.scratch = folder.with_name(f".{folder.name}.partial")
        size = lambda tensor: math.prod(tensor.shape) * self.dtype.itemsize  # noqa: E731
        self._shards = fill_files(planned, size, shard_bytes)
        self.places: dict[str, Place] = {}
        self._headers: dict[str, bytes] = {}
        for i, shard in enumerate(self._shards):
            name = SINGLE if len(self._shards) == 1 else f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._headers[name], places = _header(name, shard, self.dtype.itemsize, CODES[dtype])
            self.places |= places
        self.total = sum(place.size for place in self.places.values())
        self.rows: list[dict[str, Any]] = []

    def check(self, extra: int = 0) -> None:
        """Raises UserError for an output that exists, and for too little space on its disk."""
        parent = check_new(self.folder)
        written = sum(p.stat().st_size for p in self.scratch.iterdir()) if self.scratch.is_dir() else 0
        needed, free = self.total + extra - written, shutil.disk_usage(parent).free
        if needed > free:
            raise UserError(
                f"{self.folder} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB: free some space"
            )

    @contextmanager
    def opened(self, digest: str) -> Iterator["Output"]:
        """Holds the folder for this process, and continues what an earlier one with the same `digest` wrote.

        Raises InUse while another process writes it.
        """
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            with (self.scratch / LOCK).open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise InUse(f"{self.folder} is written by another process: wait for it") from None
                self._resume(digest)
                yield self
        except OSError as e:
            raise UserError(f"cannot write {self.folder}: {e.strerror or e}") from None

    def _resume(self, digest: str) -> None:
        about = self.scratch / ABOUT
        if about.exists() and files.read_json(about).get("digest") == digest:
            lines = (
                (self.scratch / ROWS).read_text(encoding="utf-8").split("\n") if (self.scratch / ROWS).exists() else []
            )
            self.rows = [json.loads(line) for line in lines[:-1]]
            (self.scratch / ROWS).write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
            return
        for path in self.scratch.iterdir():
            if path.name != LOCK:
                path.unlink()
        for name, header in self._headers.items():
            (self.scratch / name).write_bytes(header)
        files.write_json(about, {"digest": digest})

    def write(self, name: str, values: np.ndarray, row: Mapping[str, Any]) -> None:
        """Writes a tensor, rounded once, and its record: it counts as written when its record is complete."""
        place, flat = self.places[name], values.reshape(-1)
        with (self.scratch / place.file).open("r+b") as file:
            file.seek(place.offset)
            for part in blocks(flat.size):
                file.write(np.ascontiguousarray(flat[part], self.dtype).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        with (self.scratch / ROWS).open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(files.to_json(row)) + "\n")
        self.rows.append(dict(row))

    def read(self, name: str) -> np.ndarray:
        """A tensor as it was stored, flat."""
        place = self.places[name]
        count = place.size // self.dtype.itemsize
        return np.fromfile(self.scratch / place.file, self.dtype, count, offset=place.offset)

    def finish(self) -> None:
        """Gives the folder its name. `opened` must hold it."""
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {name: place.file for name, place in self.places.items()},
            }
            (self.scratch / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name in (ROWS, ABOUT, LOCK):
            (self.scratch / name).unlink(missing_ok=True)
        files.sync_folder(self.scratch)
        if self.folder.exists():
            self.folder.rmdir()
        self.scratch.rename(self.folder)


def digest_of(*parts: Any) -> str:
    """A hash of all that decides the result."""
    return hashlib.sha256(json.dumps(files.to_json(parts), sort_keys=True).encode()).hexdigest()


def _header(name: str, shard: Sequence[PlannedTensor], itemsize: int, code: str) -> tuple[bytes, dict[str, Place]]:
    """The header of a safetensors file, and the places of its tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        size = int(np.prod(tensor.shape, dtype=np.int64)) * itemsize
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    places = {t.name: Place(name, first + entries[t.name]["data_offsets"][0], 0) for t in shard}
    sized = {n: p._replace(size=int(np.diff(entries[n]["data_offsets"])[0])) for n, p in places.items()}
    return struct.pack("<Q", len(text)) + text, sized
