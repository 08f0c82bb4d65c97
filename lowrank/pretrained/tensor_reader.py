"""Tensors on disk: read a few rows at a time, so that a model is never in memory twice."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from lowrank.core.errors import UserError

Rows = Callable[[int, int], np.ndarray]
EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}  # all of whose bits are set in what is not finite


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    `read(start, stop)` returns those rows (of axis 0) in a floating-point dtype; `dtype` names what is stored, and
    only what is `readable` may be read. `flipped`: the file keeps a matrix `[a, b]` where the Hugging Face checkpoint
    has `[b, a]`. `flat` reads a tensor of three axes as a matrix, the first two axes as one.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Rows
    readable: bool = True
    flipped: bool = False
    blocks: Rows | None = None
    flat: Rows | None = None


class Source(Protocol):
    """A checkpoint that has been found: what it says of itself, and its tensors."""

    name: str
    where: str
    hf_config: dict

    def tokenizer(self) -> object:
        """The tokenizer that came with it."""

    def tensors(self, wanted: list[str]) -> dict[str, Stored]:
        """All its tensors, under their Hugging Face names where they are `wanted`."""


def read_array(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array that starts `offset` bytes into a file. Raises UserError when the file ends before it does."""
    count = int(np.prod(shape, dtype=np.int64))
    array = np.fromfile(path, dtype, count, offset=offset)
    if array.size != count:
        raise UserError(f"{path} is truncated: it ends at byte {path.stat().st_size}, inside a tensor")
    return array.reshape(shape)


def finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values of a tensor. Raises UserError if one is NaN or infinite."""
    if values.dtype.name in EXPONENT:  # by their bits: NumPy takes seven times as long to look at 16-bit floats
        mask = np.uint16(EXPONENT[values.dtype.name])
        bad = bool(((values.view(np.uint16) & mask) == mask).any())
    else:
        bad = not np.isfinite(values).all()
    if bad:
        raise UserError(f"tensor {name!r} holds NaN or infinite values")
    return values


def grouped(tensor: Stored, group: int) -> Stored:
    """Undoes how llama.cpp reorders the rows of q and k: in each head of `group` rows it interleaves the halves."""

    def restored(of: Rows) -> Rows:
        def read(start: int, stop: int) -> np.ndarray:
            low, high = start // group * group, -(-stop // group) * group
            rows = of(low, high)
            halves = rows.reshape(-1, group // 2, 2, *rows.shape[1:])
            return halves.swapaxes(1, 2).reshape(rows.shape)[start - low : stop - low]

        return read

    blocks = restored(tensor.blocks) if tensor.blocks else None
    return dataclasses.replace(tensor, read=restored(tensor.read), blocks=blocks)


def matrix(tensor: Stored, first: int, rows: int) -> Stored:
    """`rows` rows, from `first` on, of a tensor that can be read `flat`."""
    read = lambda start, stop: tensor.flat(first + start, first + stop)  # noqa: E731
    return Stored((rows, tensor.shape[-1]), tensor.dtype, read, tensor.readable)


def shifted(tensor: Stored, by: float) -> Stored:
    """The tensor plus a number."""
    read = lambda start, stop: tensor.read(start, stop) + np.float32(by)  # noqa: E731
    return dataclasses.replace(tensor, read=read, blocks=None)
