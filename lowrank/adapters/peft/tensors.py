"""`adapter_model.safetensors`: float32 arrays by PEFT's names. A pickle is never read."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, flax, safe_open
from safetensors.numpy import save

from lowrank.adapters.peft import names
from lowrank.core import files
from lowrank.core.errors import UserError, nearest
from lowrank.core.paths import AnyPath, PathLike, as_path, exists, local_file, require_file

NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
T = TypeVar("T")


def on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array as float32 NumPy, gathered from all processes. Every process must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, dtype=np.float32)


def write_tensors(directory: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors to a file that is then renamed into place."""
    arrays = {key: np.ascontiguousarray(array, np.float32) for key, array in tensors.items()}
    files.write_bytes(as_path(directory) / NAME, save(arrays, metadata={"format": "pt"}))


def read_tensors(directory: PathLike) -> dict[str, np.ndarray]:
    """All tensors as float32. Raises UserError for a file that is missing, broken or holds NaN or infinity."""
    path = _path(directory)
    try:
        with _opened(path) as file:
            tensors = {key: np.asarray(x, np.float32) for key, x in flax.load_file(file).items()}
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise _unreadable(path, e) from None
    check_finite(path, tensors)
    return _plain(tensors, directory)


def check_finite(where: PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for key, array in tensors.items():
        if not np.all(np.isfinite(array)):
            raise UserError(f"{where}: {key} holds NaN or infinite values: the adapter is broken")


def read_shapes(directory: PathLike) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the file's header alone."""
    path = _path(directory)
    try:
        with _opened(path) as local, safe_open(local, framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise _unreadable(path, e) from None
    return _plain(shapes, directory)


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[pathlib.Path]:
    """The local file. Raises OSError at once for a pipe, a device or a folder."""
    with local_file(path) as local:
        require_file(local)
        yield local


def _unreadable(path: AnyPath, error: Exception) -> UserError:
    return UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def _plain(found: Mapping[str, T], directory: PathLike) -> dict[str, T]:
    """The entries by the names that `save_pretrained` gives."""
    return {name: found[key] for key, name in names.plain_names(found, directory).items()}


def _path(directory: PathLike) -> AnyPath:
    path = as_path(directory) / NAME
    if not exists(path):
        pickled = " (adapter_model.bin is a pickle, which is never read)"
        raise UserError(f"{directory} has no {NAME}{pickled if exists(path.with_name('adapter_model.bin')) else ''}")
    return path


def check_shapes(path: PathLike, found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless `found` has exactly the `expected` names and shapes; it names the first culprit."""
    missing = [key for key in expected if key not in found]
    extra = sorted(key for key in found if key not in expected)
    if extra:
        raise UserError(
            f"{path}: {extra[0]} does not belong to a module that the adapter targets{nearest(extra[0], missing)}"
        )
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing, although adapter_config.json asks for it")
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise UserError(f"{path}: {key} has shape {found[key].shape}; this base and config need {shape}")
