"""Paths of a run's files: a local path, or an object in a bucket, `gs://BUCKET/...`.

A local path is a `pathlib.Path`, and a path in a bucket is an `etils.epath.Path`, the type that Orbax uses. Both join,
and have names and parents. The functions of this module read and list them; `files` writes them whole, `generations`
creates and replaces them on conditions, and `mirror` appends to them.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import re
import stat
import tempfile
from collections.abc import Iterator
from typing import Any, TypeAlias

from etils import epath

from lowrank.core.errors import UserError

AnyPath: TypeAlias = pathlib.Path  # or an epath.Path, which is `Any` to mypy
PathLike = str | os.PathLike[str]
BUCKET = "gs://"
# What a path may lead to that is no file, where reading would wait or never end.
OTHERS = {
    "a named pipe": stat.S_ISFIFO,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    "a socket": stat.S_ISSOCK,
    "a folder": stat.S_ISDIR,
}


def expand(path: PathLike) -> str:
    """The path with `~` as the home folder and `$NAME` as the environment's variable, as a shell writes them.

    Raises UserError for a user or a variable that there is not, of which a folder would else get the name.
    """
    text = os.path.expanduser(os.path.expandvars(os.fspath(path)))
    for part in text.split("/"):
        if re.fullmatch(r"\$(\w+|\{\w+\})", part):
            raise UserError(f"{os.fspath(path)}: the environment variable {part} is not set")
    if text.startswith("~") and not os.path.exists(text):
        raise UserError(f"{os.fspath(path)}: {text.partition('/')[0]} has no home folder")
    return text


def as_path(path: PathLike) -> AnyPath:
    """The path as an object, expanded by `expand`.

    Raises UserError for a URL that is not `gs://BUCKET/...`, and without gcsfs for those.
    """
    text = expand(path)
    if not (url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)):
        return pathlib.Path(text)
    if not re.match(r"gs://[^/]", text):  # a pathlib.Path has dropped a slash of its URL
        raise UserError(f"{text} is a URL of {url[1]}: give a local path, or gs://BUCKET/FOLDER as a string")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} needs the package gcsfs: install it with pip install 'lowrank[gcs]'")
    _store()
    return epath.Path(text)


def in_bucket(path: PathLike) -> bool:
    """Whether the path is that of an object in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def as_local_path(path: PathLike) -> pathlib.Path:
    """`as_path` of a path that must be local. Raises UserError for one in a bucket."""
    if in_bucket(path):
        raise UserError(f"{os.fspath(path)} is in a bucket: give a local folder")
    return as_path(path)


def read_bytes(path: PathLike) -> bytes:
    """The content of a file. Raises OSError if it cannot be read, and FileNotFoundError if it does not exist."""
    if not in_bucket(path):
        return pathlib.Path(path).read_bytes()
    with store_errors(path):
        return _store().cat_file(os.fspath(path))


def read_text(path: PathLike) -> str:
    """`read_bytes` as UTF-8; text of another encoding is a ValueError."""
    return read_bytes(path).decode()


def is_missing(path: PathLike) -> bool:
    """Whether there is nothing at a local path; a link that leads round in a circle is something."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def require_file(path: PathLike, largest: int | None = None) -> None:
    """Raises OSError at once for a local path to what is no file (a pipe, a device, a folder), or a too large one."""
    found = os.stat(path)
    for kind, is_kind in OTHERS.items():
        if is_kind(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))
    if largest is not None and found.st_size > largest:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, and at most {largest} are read", os.fspath(path))


def write_object(path: PathLike, data: bytes) -> None:
    """Writes an object of a bucket in one piece. Raises OSError; `files.write_bytes` takes any path."""
    with store_errors(path):
        _store().pipe_file(os.fspath(path), data)


def exists(path: PathLike) -> bool:
    """Whether there is a file or a folder at the path. Raises OSError where the store does not answer."""
    return _kind(path) is not None


def is_folder(path: PathLike) -> bool:
    """Whether there is a folder at the path; a bucket has the folders that its objects are in."""
    return _kind(path) == "directory"


def children(path: PathLike) -> list[AnyPath]:
    """The files and folders in a folder by name; none if the folder does not exist."""
    if not in_bucket(path):
        return sorted(pathlib.Path(path).iterdir()) if is_folder(path) else []
    if not is_folder(path):
        return []
    with store_errors(path):
        names = {name.rstrip("/").rpartition("/")[2] for name in _store().ls(os.fspath(path), detail=False)}
    return [as_path(path) / name for name in sorted(names)]


def size(path: PathLike) -> int:
    """The bytes of a file, or of all the files in a folder."""
    if in_bucket(path):
        with store_errors(path):
            return _store().du(os.fspath(path))
    path = pathlib.Path(path)
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


@contextlib.contextmanager
def local_file(path: PathLike) -> Iterator[pathlib.Path]:
    """A local file with the content of the file: itself, or a copy of an object, which is then deleted."""
    if not in_bucket(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="lowrank-") as folder:
        copy = pathlib.Path(folder) / as_path(path).name
        with store_errors(path):
            _store().get_file(os.fspath(path), str(copy))
        yield copy


@contextlib.contextmanager
def store_errors(path: PathLike) -> Iterator[None]:
    """Raises every error of a store as an OSError of one line that names the path."""
    try:
        yield
    except FileNotFoundError as e:
        raise FileNotFoundError(2, "No such object or bucket", os.fspath(path)) from e
    except Exception as e:  # the store's libraries have many kinds
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise OSError(5, " ".join([lines[0], *lines[1:2]])[:300], os.fspath(path)) from e


def _kind(path: PathLike) -> str | None:
    if not in_bucket(path):
        local = pathlib.Path(path)
        return "directory" if local.is_dir() else "file" if local.exists() else None
    try:
        with store_errors(path):
            return _store().info(os.fspath(path))["type"]
    except FileNotFoundError:
        return None


@functools.cache
def _store() -> Any:
    """The file system that Orbax uses as well. Lists are read anew each time, as other processes write objects."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)
