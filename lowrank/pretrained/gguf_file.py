"""A GGUF file: its metadata, and its tensors, which are dequantized a few rows at a time.

The `gguf` package knows the block formats; its reader is not used because it makes one array object per token
of the vocabulary (seconds, and hundreds of megabytes). The format: a header, key-value pairs, the tensors' table,
and the data, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import functools
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.constants import GGUFValueType as Kind

from lowrank.core import schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import GGUFMetadata
from lowrank.core.paths import require_file
from lowrank.pretrained.tensor_reader import StoredTensor, read_array, refuse_pointer

SCALARS = {
    Kind.UINT8: "B",
    Kind.INT8: "b",
    Kind.BOOL: "?",
    Kind.UINT16: "H",
    Kind.INT16: "h",
    Kind.UINT32: "I",
    Kind.INT32: "i",
    Kind.FLOAT32: "f",
    Kind.UINT64: "Q",
    Kind.INT64: "q",
    Kind.FLOAT64: "d",
}
_CORRUPT = (OSError, ValueError, LookupError, ArithmeticError, TypeError, MemoryError, RecursionError)


@dataclasses.dataclass(frozen=True)
class GGUF:
    """The content of a file, without the tensors' values. `metadata` holds numbers, strings, and lists of these."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """`metadata[key]`, or the default. Raises UserError when both are missing."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no metadata {key!r}: it is not a complete model")
        return value


class _Cursor:
    """A reading position in a byte buffer; a read past its end raises ValueError."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"it ends at byte {len(self.data)}, inside its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self.bytes(struct.calcsize(f"<{layout}")))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return self.bytes(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == Kind.STRING:
            return self.string()
        if kind != Kind.ARRAY:
            return self.unpack(SCALARS[Kind(kind)])[0]
        kind, count = self.unpack("IQ")
        if kind in (Kind.STRING, Kind.ARRAY):
            return [self.value(kind) for _ in range(count)]
        return list(self.unpack(f"{count}{SCALARS[Kind(kind)]}"))


def open_gguf(path: Path) -> GGUF:
    """Reads the header of a GGUF file. Raises UserError when the file is missing, truncated or corrupt."""
    try:
        require_file(path)
        refuse_pointer(path)
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} is not a file") from None
    except UserError:
        raise
    except (*_CORRUPT, struct.error) as e:
        raise UserError(f"{path} is truncated or corrupt: {e}") from None


def _parse(path: Path, cursor: _Cursor) -> GGUF:
    magic, version = cursor.bytes(4), cursor.unpack("I")[0]
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it does not start as a GGUF file of version 2 or 3 does (magic {magic!r})")
    tensor_count, pair_count = cursor.unpack("QQ")
    metadata = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    schema.check(str(path), metadata, GGUFMetadata)
    table = [_table_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    data_start, size = -(-cursor.at // alignment) * alignment, len(cursor.data)
    tensors = {name: _stored(path, size, name, shape, kind, data_start + at) for name, shape, kind, at in table}
    if len(tensors) < len(table):
        raise ValueError("two tensors have the same name")
    return GGUF(path, metadata, tensors)


def _table_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    shape = cursor.unpack(f"{cursor.unpack('I')[0]}Q")[::-1]  # the fastest axis comes first in the file
    kind, offset = cursor.unpack("IQ")
    return name, shape, kind, offset


def _stored(path: Path, size: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    kind = GGMLQuantizationType(kind)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    count = int(np.prod(shape, dtype=object))
    if row % per_block or offset + count // per_block * block_bytes > size:
        raise ValueError(f"tensor {name!r} {shape} in {kind.name} does not fit in its {size} bytes")
    row_bytes = row // per_block * block_bytes
    read = functools.partial(_read, path, offset, kind, shape, row_bytes)
    blocks = functools.partial(_blocks, path, offset, row_bytes) if len(shape) == 2 else None
    return StoredTensor(shape, kind.name, read, readable=_readable(kind, block_bytes), blocks=blocks)


@functools.cache
def _readable(kind: GGMLQuantizationType, block_bytes: int) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:  # integers, and formats newer than the package
        return False
    return True


def _read(
    path: Path, offset: int, kind: GGMLQuantizationType, shape: tuple[int, ...], row_bytes: int, start: int, stop: int
) -> np.ndarray:
    if len(shape) < 2:  # a vector is one row of blocks, which is decoded whole
        return gguf.quants.dequantize(read_array(path, np.uint8, offset, (row_bytes,)), kind)[start:stop]
    inner = int(np.prod(shape[1:-1], dtype=np.int64))
    packed = read_array(path, np.uint8, offset + start * inner * row_bytes, ((stop - start) * inner, row_bytes))
    return gguf.quants.dequantize(packed, kind).reshape(stop - start, *shape[1:])


def _blocks(path: Path, offset: int, row_bytes: int, start: int, stop: int) -> np.ndarray:
    return read_array(path, np.uint8, offset + start * row_bytes, (stop - start, row_bytes))
