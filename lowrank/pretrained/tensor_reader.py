"""The tensors of a checkpoint on disk, read a few rows at a time, so that the host never holds a whole model."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from lowrank.core.errors import UserError

ReadRows = Callable[[int, int], np.ndarray]  # (start, stop) -> those rows
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
EXPONENT_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00}  # all of them are set in NaN and in infinities


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    `read(start, stop)` returns rows (of axis 0) in a floating-point dtype; `dtype` names the stored dtype, and only a
    `readable` tensor may be read. `flipped`: the file stores a matrix `[a, b]` where the Hugging Face checkpoint has
    `[b, a]`. `blocks` reads the rows of a GGUF matrix as bytes; `flat` reads a tensor of three axes as a matrix, its
    first two axes as one.
    """

    shape: tuple[int, ...]
    dtype: str
    read: ReadRows
    readable: bool = True
    flipped: bool = False
    blocks: ReadRows | None = None
    flat: ReadRows | None = None


class CheckpointSource(Protocol):
    """A pretrained checkpoint in any format: its config, tokenizer and tensors."""

    name: str
    where: str
    hf_config: dict[str, Any]

    def has_tokenizer(self) -> bool:
        """Whether the checkpoint holds a tokenizer."""

    def tokenizer(self) -> Any:
        """The tokenizer of the checkpoint, a `pretrained.Tokenizer`."""

    def tensors(self, wanted: Sequence[str]) -> dict[str, StoredTensor]:
        """All its tensors, under their Hugging Face names where these are `wanted`."""
        ...


def refuse_pointer(path: Path) -> None:
    """Raises UserError for a file that only names its content, as Git LFS leaves one in a clone without its objects."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")


def read_array(path: Path, dtype: DTypeLike, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array that starts `offset` bytes into a file. Raises UserError when the file ends too early."""
    count = int(np.prod(shape, dtype=np.int64))
    array = np.fromfile(path, dtype, count, offset=offset)
    if array.size != count:
        raise UserError(f"{path} is truncated: it ends at byte {path.stat().st_size}, inside a tensor")
    return array.reshape(shape)


def check_finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values of the tensor `name`. Raises UserError if one of them is NaN or infinite."""
    if values.dtype.name in EXPONENT_BITS:  # NumPy's isfinite takes seven times as long for 16-bit floats
        mask = np.uint16(EXPONENT_BITS[values.dtype.name])
        bad = bool(((values.view(np.uint16) & mask) == mask).any())
    else:
        bad = not np.isfinite(values).all()
    if bad:
        raise UserError(f"tensor {name!r} holds NaN or infinite values: the checkpoint is broken")
    return values


def deinterleave_heads(tensor: StoredTensor, head_dim: int) -> StoredTensor:
    """Undoes llama.cpp's order of the rows of q and k, which interleaves the halves of each head of `head_dim` rows."""

    def reordered(read_rows: ReadRows) -> ReadRows:
        def read(start: int, stop: int) -> np.ndarray:
            low, high = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
            rows = read_rows(low, high)
            halves = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
            return halves.swapaxes(1, 2).reshape(rows.shape)[start - low : stop - low]

        return read

    blocks = reordered(tensor.blocks) if tensor.blocks else None
    return dataclasses.replace(tensor, read=reordered(tensor.read), blocks=blocks)


def interleave_projections(tensor: StoredTensor, heads: int, parts: int = 3) -> StoredTensor:
    """The rows of q, k and v, one projection after the other, in the order of GPT-NeoX: those of each head together."""
    size = tensor.shape[0] // (heads * parts)

    def reordered(read_rows: ReadRows) -> ReadRows:
        def read(start: int, stop: int) -> np.ndarray:
            pieces = []
            for first in range(start - start % size, stop, size):
                head, part = divmod(first // size, parts)
                source = (part * heads + head) * size - first
                pieces.append(read_rows(source + max(start, first), source + min(stop, first + size)))
            return np.concatenate(pieces)

        return read

    blocks = reordered(tensor.blocks) if tensor.blocks else None
    return dataclasses.replace(tensor, read=reordered(tensor.read), blocks=blocks)


def slice_flat_rows(tensor: StoredTensor, first: int, rows: int) -> StoredTensor:
    """`rows` rows, from `first` on, of a tensor that can be read `flat`."""
    flat = tensor.flat
    assert flat is not None

    def read(start: int, stop: int) -> np.ndarray:
        return flat(first + start, first + stop)

    return StoredTensor((rows, tensor.shape[-1]), tensor.dtype, read, tensor.readable)


def add_constant(tensor: StoredTensor, constant: float) -> StoredTensor:
    """The tensor plus a constant, added in float32."""

    def read(start: int, stop: int) -> np.ndarray:
        return tensor.read(start, stop) + np.float32(constant)

    return dataclasses.replace(tensor, read=read, blocks=None)
