"""The files of a Hugging Face directory: config.json, and the tensors of its safetensors files."""

import functools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from lowrank.core import schema
from lowrank.core.errors import UserError
from lowrank.core.json_types import SafetensorsEntry, SafetensorsIndex
from lowrank.core.paths import require_file
from lowrank.pretrained.families import Config, family_of
from lowrank.pretrained.tensor_reader import StoredTensor, read_array, refuse_pointer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_FLOAT = float(np.finfo(np.float32).max)
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# The dtypes of the arrays of quantized kernels.
CODES = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
CODES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def parse_config(where: str, hf_config: Mapping[str, Any]) -> Config:
    """A `config.json` as our config. Raises UserError naming `where` for a config that cannot be used."""
    try:
        return _check_numbers(family_of(hf_config).config(hf_config))
    except (ValueError, TypeError, LookupError, ArithmeticError) as e:
        reason = str(e) if isinstance(e, UserError) else f"its config cannot be used: {e!r}"
        raise UserError(f"{where}: {reason}") from None


def _check_numbers(config: Config) -> Config:
    """Raises UserError naming the first number that float32, in which models compute, cannot hold."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise UserError(f"its config gives the model a {name} of {value}, beyond float32")
    return config


def has_tensors(directory: Path) -> bool:
    """Whether a directory holds safetensors, or their index."""
    return (directory / SINGLE).exists() or (directory / INDEX).exists()


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name; only headers are read.

    Raises UserError for a missing, truncated or corrupt file, and for a checkpoint that exists only as a pickle.
    """
    if (directory / SINGLE).exists():
        return open_file(directory / SINGLE)
    if not (directory / INDEX).exists():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
        advice = f", only {pickles[0]}: pickles are never read, convert it to safetensors" if pickles else ""
        raise UserError(f"{directory} has no {SINGLE}{advice}")
    return _open_shards(directory, schema.decode(directory / INDEX, SafetensorsIndex)["weight_map"])


def _open_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise UserError(f"{directory / INDEX} names {name!r}, which is not a file beside it")
        shard = open_file(directory / name)
        if twice := sorted(shard.keys() & tensors.keys()):
            raise UserError(f"{directory / name}: tensor {twice[0]!r} is in another shard too")
        tensors |= shard
    for name, file in weight_map.items():
        if name not in tensors:
            raise UserError(f"{directory / file}: tensor {name!r} is missing, though the index lists it")
    return tensors


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; only its header is read. Raises UserError as `open_directory`."""
    try:
        require_file(path)
        refuse_pointer(path)
        with safetensors.safe_open(path, framework="np"):  # checks that the header is sound and covers the file
            pass
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        schema.check(str(path), header, dict[str, SafetensorsEntry])
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError:
        raise
    except (OSError, ValueError, struct.error, safetensors.SafetensorError) as e:
        raise UserError(f"{path} is truncated or corrupt: {e}") from None
    return {name: _stored(path, 8 + length, entry) for name, entry in header.items()}


def _stored(path: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
    shape = tuple(entry["shape"])
    # Not read through the library: the pages of its memory map would count as the process's memory.
    read = functools.partial(_read, path, start + entry["data_offsets"][0], entry["dtype"])
    flat = functools.partial(read, (shape[0] * shape[1], shape[2])) if len(shape) == 3 else None
    return StoredTensor(shape, entry["dtype"], functools.partial(read, shape), entry["dtype"] in DTYPES, flat=flat)


def _read(path: Path, offset: int, dtype: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    kind, row = np.dtype({**CODES, **DTYPES}[dtype]), shape[1:]
    first = start * int(np.prod(row, dtype=np.int64)) * kind.itemsize
    return read_array(path, kind, offset + first, (stop - start, *row))
