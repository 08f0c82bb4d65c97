"""Atomic writes, which leave a complete file or none, and the conversion of values to JSON.

A path is a local path or one in a bucket, as `paths.as_path` takes it.
"""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lowrank.core.errors import InUse, UserError
from lowrank.core.paths import AnyPath, PathLike, as_local_path, as_path, in_bucket, read_text, write_object


def write_text(path: PathLike, text: str) -> AnyPath:
    """Writes a file beside `path` and renames it: readers see the old text or the new text, never a part.

    In a bucket, an object is written in one request, which has the same effect.

    Raises UserError naming the file, which keeps its old content, when the disk refuses the write.
    """
    return write_bytes(path, text.encode())


def write_bytes(path: PathLike, data: bytes) -> AnyPath:
    """`write_text` for bytes, with the same errors."""
    path = as_path(path)
    try:
        if in_bucket(path):
            write_object(path, data)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path, data) as beside:
            beside.replace(path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    return path


@contextlib.contextmanager
def scratch_beside(path: pathlib.Path, folder: bool = False) -> Iterator[pathlib.Path]:
    """An empty file or folder beside `path`, in which what `path` will be is written; removed unless it is renamed.

    It is locked while this process lives. Those that a killed process left beside `path` are removed.
    """
    for old in _leftovers(path.parent).pop(path.name, ()):
        _remove_abandoned(old)
    while True:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        beside.mkdir() if folder else beside.touch(exist_ok=False)  # modes follow the umask, that of mkstemp does not
        try:
            handle = os.open(beside, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if beside.exists():
            break
        os.close(handle)
    try:
        yield beside
    finally:
        os.close(handle)
        _remove(beside)


@contextlib.contextmanager
def written_beside(path: pathlib.Path, data: bytes) -> Iterator[pathlib.Path]:
    """A `scratch_beside` file with this content, on the disk."""
    with scratch_beside(path) as beside:
        with beside.open("r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash after the renaming may leave an empty file
        yield beside


@functools.cache
def _leftovers(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The scratch files that are in a folder when this process first writes to it, by the name that they would get."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in folder.iterdir():
        if match := re.fullmatch(r"\.(.+)\.[0-9a-f]{12}", path.name):
            found.setdefault(match[1], []).append(path)
    return found


def _remove_abandoned(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # it is gone, it is locked, or nothing can be locked here
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(handle)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: PathLike) -> Iterator[pathlib.Path]:
    """The local path of what a command writes, held for this process by a locked file beside it.

    A killed process leaves that file unlocked, and the next one takes it. Raises InUse while another process holds it.
    """
    output = as_local_path(path)
    beside = output.absolute().with_name(f".{output.name}.lock")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(beside)
    except OSError as e:
        raise UserError(f"cannot write {output}: {e.strerror or e}") from None
    if handle is None:
        raise InUse(f"{output} is written by another process: wait for it, or name another output")
    try:
        yield output
    finally:
        beside.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: pathlib.Path) -> int | None:
    """A descriptor of the file, which is locked, or None while another process has locked it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # a file system without locks
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        os.close(handle)  # its last owner has removed it


def require_space(path: PathLike, needed: int) -> None:
    """Raises UserError if the disk on which `path` will be has less than `needed` bytes free."""
    place = as_path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{path} will take {needed} bytes, and its disk has {free} left: make room, or name another")


def sync_folder(folder: pathlib.Path) -> None:
    """Has the disk hold the files of a local folder, each readable by those for whom new files are.

    Libraries write some files with modes of their own, whatever the umask says.
    """
    _sync([*folder.iterdir(), folder], folder)


def sync_file(path: pathlib.Path) -> None:
    """`sync_folder` of one local file, which is then renamed."""
    _sync([path], path.parent)


def _sync(paths: Iterable[pathlib.Path], folder: pathlib.Path) -> None:
    probe = folder / f".{secrets.token_hex(6)}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in paths:
        if path.is_file():
            path.chmod(mode)
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_json(path: PathLike, value: Any) -> AnyPath:
    """`write_text` of `value` as indented JSON. NaN and infinities become strings, as in `to_json`."""
    return write_text(path, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, as `json.loads`, and also for values that Python cannot take."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its arrays or objects are nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as e:  # a whole number of thousands of digits
        raise ValueError(str(e).partition(";")[0]) from None


def read_json(path: PathLike) -> Any:
    """The value of a JSON file. Raises UserError when it cannot be read."""
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None


def to_json(value: Any, where: str = "value") -> Any:
    """`value` in the types of JSON: mappings -> dict, sequences -> list, NumPy and JAX scalars -> numbers.

    Non-finite floats become "NaN", "Infinity" and "-Infinity", which `float` reads back. A value of
    any other type raises UserError naming its place.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {str(k): to_json(v, f"{where}.{k}") for k, v in dict(value).items()}
    if isinstance(value, list | tuple):
        return [to_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "tolist"):
        return to_json(value.tolist(), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise UserError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
