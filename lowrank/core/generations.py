"""Files that several processes may write: they are created, and replaced, only if nobody else has done so meanwhile.

Each content of a file has a generation, a number that grows with every replacement. A bucket compares generations by
itself. Local files are compared under a lock of their folder, which every machine that shares the folder must respect.
"""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.files import written_beside
from lowrank.core.paths import PathLike, as_path, in_bucket, store_errors

LOCK = ".generations.lock"


@dataclasses.dataclass(frozen=True)
class Version:
    """The content of a file, its generation, and the time of that in seconds since 1970, by the store's clock."""

    data: bytes
    generation: int
    modified: float


def read_version(path: PathLike) -> Version | None:
    """The content of a file with its generation, or None if it does not exist. Raises OSError if it cannot be read."""
    return _read_object(path) if in_bucket(path) else _read_local(pathlib.Path(path))


def create_exclusive(path: PathLike, data: bytes) -> int | None:
    """Creates a file, and its folder; returns its generation, or None if the file exists already.

    Of several processes that create one file, a single one succeeds, and readers see all of `data`. A store's reply
    may get lost: a process that put its name into `data` and gets None finds out by reading the file. Raises UserError
    if the file cannot be written.
    """
    return _put(path, data, 0)


def replace_if(path: PathLike, data: bytes, generation: int) -> int | None:
    """Replaces a file that still has the given generation; returns its new one, or None if it has not.

    The remarks on `create_exclusive` apply.
    """
    return _put(path, data, generation)


def store_time(folder: PathLike) -> float:
    """The seconds since 1970 by the clock of the store that holds `folder`: the clock of `Version.modified`."""
    probe = as_path(folder) / f".clock-{uuid.uuid4().hex}"
    if create_exclusive(probe, b"") is None or (found := read_version(probe)) is None:
        raise UserError(f"cannot read the clock of {folder}: {probe.name} is gone")
    with store_errors(probe):
        probe.unlink(missing_ok=True)
    return found.modified


def modified_times(folder: PathLike) -> dict[str, float]:
    """`{name: time of its last write}` of the files in a folder, by the store's clock; none if it does not exist.

    Names that start with a dot are left out: files that are being written. Raises OSError where the store does not
    answer.
    """
    return _object_times(folder) if in_bucket(folder) else _local_times(pathlib.Path(folder))


def _local_times(folder: pathlib.Path) -> dict[str, float]:
    times = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    times[entry.name] = os.stat(entry.path).st_mtime
    return times


def _object_times(folder: PathLike) -> dict[str, float]:
    bucket, _, prefix = os.fspath(as_path(folder)).removeprefix("gs://").partition("/")
    with store_errors(folder):
        blobs = list(_client().list_blobs(bucket, prefix=f"{prefix}/", delimiter="/"))
    named = {blob.name.rpartition("/")[2]: blob.updated.timestamp() for blob in blobs}
    return {name: time for name, time in named.items() if name and not name.startswith(".")}


def _put(path: PathLike, data: bytes, generation: int) -> int | None:
    local = pathlib.Path(as_path(path))
    try:
        if in_bucket(path):
            return _put_object(path, data, generation)
        return _replace_local(local, data, generation) if generation else _create_local(local, data)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


def _read_local(path: pathlib.Path) -> Version | None:
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            return Version(file.read(), stat.st_mtime_ns, stat.st_mtime_ns / 1e9)
    except FileNotFoundError:
        return None


def _create_local(path: pathlib.Path, data: bytes) -> int | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path, data) as new:
        try:
            os.link(new, path)  # O_CREAT with O_EXCL, but never a file without its content
        except FileExistsError:
            return None
        return new.stat().st_mtime_ns


def _replace_local(path: pathlib.Path, data: bytes, generation: int) -> int | None:
    with _folder_lock(path.parent), written_beside(path, data) as new:
        old = _read_local(path)
        if old is None or old.generation != generation:
            return None
        if new.stat().st_mtime_ns <= generation:  # a clock of coarse ticks
            os.utime(new, ns=(generation + 1, generation + 1))
        os.replace(new, path)
        return path.stat().st_mtime_ns


@contextlib.contextmanager
def _folder_lock(folder: pathlib.Path) -> Iterator[None]:
    with open(folder / LOCK, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_object(path: PathLike) -> Version | None:
    from google.api_core import exceptions

    while True:
        with store_errors(path):
            blob = _blob(path)
            try:
                blob.reload()
                data = blob.download_as_bytes(if_generation_match=blob.generation)
                return Version(data, int(blob.generation), blob.updated.timestamp())
            except exceptions.NotFound:
                return None
            except exceptions.PreconditionFailed:  # replaced since `reload`
                continue


def _put_object(path: PathLike, data: bytes, generation: int) -> int | None:
    from google.api_core import exceptions

    with store_errors(path):
        blob = _blob(path)
        try:
            blob.upload_from_string(data, if_generation_match=generation)
        except exceptions.PreconditionFailed:
            return None
        except exceptions.NotFound:
            raise FileNotFoundError from None
        return int(blob.generation)


def _blob(path: PathLike) -> Any:
    """The object as Google's client has it, which compares generations; fsspec can only create."""
    bucket, _, name = os.fspath(as_path(path)).removeprefix("gs://").partition("/")
    return _client().bucket(bucket).blob(name)


@functools.cache
def _client() -> Any:
    from google.cloud import storage

    return storage.Client()
