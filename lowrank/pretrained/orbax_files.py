"""The arrays of an Orbax checkpoint, restored one at a time."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank.core.errors import UserError
from lowrank.pretrained.tensor_reader import StoredTensor

METADATA = "_METADATA"
Change = Callable[[np.ndarray], np.ndarray]


class StoredArray(NamedTuple):
    """One array of a checkpoint; `read` restores it whole, and the last one that was read is kept."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def is_orbax(directory: Path) -> bool:
    """Whether a directory is an Orbax checkpoint of a tree."""
    return (directory / METADATA).is_file()


def open_arrays(directory: Path) -> dict[str, StoredArray]:
    """Every array by its path, the keys joined by slashes; only metadata are read.

    Raises UserError for a checkpoint that Orbax cannot read.
    """
    import orbax.checkpoint as ocp  # here, as the import takes a second

    checkpointer = ocp.PyTreeCheckpointer()
    try:
        found = checkpointer.metadata(directory).item_metadata
        tree = found.tree if found else None
    except Exception as e:  # Orbax raises errors of many kinds for a damaged file
        raise UserError(f"{directory} cannot be read as an Orbax checkpoint: {_first_line(e)}") from None

    if tree is None:
        raise UserError(f"{directory} cannot be read as an Orbax checkpoint: its metadata are damaged")

    @functools.lru_cache(maxsize=1)
    def restore(path: tuple[str, ...]) -> np.ndarray:
        def nested(leaf: Any) -> Any:
            return functools.reduce(lambda inner, key: {key: inner}, reversed(path), leaf)

        found = leaves[path]
        args = ocp.args.PyTreeRestore(
            item=nested(np.zeros(found.shape, found.dtype)),
            restore_args=nested(ocp.RestoreArgs(restore_type=np.ndarray)),
            partial_restore=True,
        )
        try:
            value: Any = checkpointer.restore(directory, args=args)
        except Exception as e:
            raise UserError(f"{directory}: array {'/'.join(path)!r} cannot be read: {_first_line(e)}") from None
        return functools.reduce(lambda inner, key: inner[key], path, value)

    leaves = dict(_leaves(tree))
    return {
        "/".join(path): StoredArray(tuple(x.shape), np.dtype(x.dtype).name, functools.partial(restore, path))
        for path, x in leaves.items()
    }


def stored_tensor(
    array: StoredArray,
    change: Callable[[np.ndarray], np.ndarray],
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> StoredTensor:
    """The tensor that `finish(change(array))` is; `change` copies nothing, and `finish` keeps the shape."""
    shape = change(np.broadcast_to(np.float32(0), array.shape)).shape

    def read(start: int, stop: int) -> np.ndarray:
        return finish(change(array.read()))[start:stop]

    return StoredTensor(shape, array.dtype, read, readable="float" in array.dtype)


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        return [(path, tree)] if getattr(tree, "shape", None) is not None else []
    return [leaf for key, part in tree.items() for leaf in _leaves(part, (*path, str(key)))]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or repr(error)
