"""The folder of a run: one config for all the runs that share it, and a lock that a single run holds at a time."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from lowrank.core.errors import UserError
from lowrank.core.files import to_json, write_json

CONFIG = "config.json"
MAY_CHANGE = ("mesh", "checkpoint", "log_every", "loggers", "distributed")  # keys that a resumed run may change
_ABSENT = object()


def claim(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> Path:
    """Makes `workdir` the folder of a run with this config, or checks that it already is one; returns its path.

    The first run writes `config.json` after its model is read, so that a run that could not start does not bind
    another. Later runs must have the same values, except under the keys in `MAY_CHANGE`. Raises UserError as
    `check_config` does.
    """
    recorded, config = check_config(workdir, config), to_json(config)
    if jax.process_index() == 0 and recorded != config:
        write_json(Path(workdir) / CONFIG, config)
    return Path(workdir)


def check_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the run in `workdir`, or None. Nothing is written.

    Raises:
      UserError: the folder is a URL, or it holds a run with another config (the error names the first key that
        differs), a `config.json` that cannot be read, or checkpoints without a config.
    """
    if "://" in os.fspath(workdir):  # a path would drop a slash of it and name a folder in the working directory
        raise UserError(f"workdir {os.fspath(workdir)} is a URL: mount the storage, and give the mounted folder")
    workdir, config = Path(workdir), to_json(config, "config")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {workdir} is a file, not a folder: choose another workdir")
    path = workdir / CONFIG
    recorded = _read(path) if path.exists() else None
    if recorded is not None:
        _check_same(recorded, config, workdir)
    elif (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
        raise UserError(f"workdir {workdir} holds checkpoints without a {CONFIG}: choose another workdir")
    return recorded


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Creates `workdir` and locks it for one run at a time; the lock ends with the process in every case.

    A file system without locks does not protect the folder. Raises UserError if another run holds the lock, or if the
    folder cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"cannot write {workdir}: {e.strerror or e}") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"workdir {workdir} is in use by another run: wait for it, or choose another") from None
        except OSError:
            pass
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}; choose another workdir") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a config: choose another workdir")
    return config


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], workdir: Path) -> None:
    theirs, ours = _flat(theirs), _flat(ours)
    for key in [*ours, *theirs]:
        a, b = theirs.get(key, _ABSENT), ours.get(key, _ABSENT)
        if key.split(".")[0] not in MAY_CHANGE and (a is _ABSENT or b is _ABSENT or json.dumps(a) != json.dumps(b)):
            raise UserError(
                f"workdir {workdir} holds another config's run: {key} is {_show(a)} there and {_show(b)} here; "
                "choose another workdir"
            )


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{a: {b: 1}}` -> `{a.b: 1}`; an empty group stays, so that it differs from a missing group."""
    out = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        out.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return out
