"""The files that workers share. Every worker sees the same names, and times are those of the store, not of a worker."""

import os
import tempfile
from pathlib import Path

from lowrank.core.errors import UserError
from lowrank.core.files import write_bytes


def create(path: Path, data: bytes) -> bool:
    """Writes a new file whole, or returns False if it exists: of several writers at once, one gets True.

    Raises UserError where the file system refuses it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.chmod(beside, 0o644)  # mkstemp makes it private
            os.link(beside, path)  # which is atomic, and refuses a name that exists
        except FileExistsError:
            return False
        finally:
            os.unlink(beside)
    except OSError as e:
        raise UserError(f"cannot create {path}: {e.strerror or e}") from e
    return True


def times(folder: Path) -> dict[str, float]:
    """`{name: time of its last write}` of the files in a folder, by the store's clock; none if it does not exist."""
    found = {}
    try:
        for entry in os.scandir(folder):
            if not entry.name.startswith("."):
                found[entry.name] = _time(folder / entry.name)
    except FileNotFoundError:
        return found
    return {name: time for name, time in found.items() if time is not None}


def write_and_time(path: Path, data: bytes) -> float:
    """Writes a file anew and returns the store's time of the write."""
    write_bytes(path, data)
    time = _time(path)
    if time is None:
        raise UserError(f"{path} is gone: another program deletes the files of the study")
    return time


def exists(path: Path) -> bool:
    """Whether the file exists."""
    return path.exists()


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
