"""The folder of a run: one config for all the runs that share it, and a lock that a single run holds at a time."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import tensorstore

from lowrank.core.errors import InUse, UserError
from lowrank.core.files import parse_json, to_json, write_json
from lowrank.core.lease import Lease
from lowrank.core.paths import AnyPath, PathLike, as_path, children, exists, in_bucket, is_folder, read_text

CONFIG = "config.json"
MAY_CHANGE = ("mesh", "checkpoint", "log_every", "loggers", "distributed")  # keys that a resumed run may change
_ABSENT = object()


def claim(workdir: PathLike, config: Mapping[str, Any]) -> AnyPath:
    """Makes `workdir` the folder of a run with this config, or checks that it already is one; returns its path.

    The first run writes `config.json` after its model is read, so that a run that could not start does not bind
    another. Later runs must have the same values, except under the keys in `MAY_CHANGE`. Raises UserError as
    `check_config` does.
    """
    recorded, config = check_config(workdir, config), to_json(config)
    if jax.process_index() == 0 and recorded != config:
        write_json(as_path(workdir) / CONFIG, config)
    return as_path(workdir)


def check_config(workdir: PathLike, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the run in `workdir`, or None. Nothing is written.

    Raises:
      UserError: the path is a URL that `as_path` refuses, or the folder holds a run with another config (the error
        names the first key that differs), a `config.json` that cannot be read, or checkpoints without a config.
    """
    workdir, config = as_path(workdir), to_json(config, "config")
    try:
        found, path = exists(workdir), workdir / CONFIG
        if found and not is_folder(workdir):
            raise UserError(f"workdir {workdir} is a file, not a folder: choose another workdir")
        recorded = _read(path) if found and exists(path) else None
    except OSError as e:
        raise UserError(f"cannot read workdir {workdir}: {e.strerror or e}") from e
    if recorded is not None:
        _check_same(recorded, config, workdir)
    elif found and children(workdir / "checkpoints"):
        raise UserError(f"workdir {workdir} holds checkpoints without a {CONFIG}: choose another workdir")
    return recorded


@contextlib.contextmanager
def lock(workdir: AnyPath) -> Iterator[Callable[[], None]]:
    """Creates `workdir` and locks it for one run at a time; yields a function that raises UserError once that is lost.

    The lock of a local folder ends with the process in every case, and a file system without locks does not protect
    the folder. That of a bucket is a lease, which a killed process keeps for up to a minute. Raises UserError if
    another run holds the lock, or if the folder cannot be written.
    """
    if jax.process_index() != 0:
        yield _never_lost
    elif in_bucket(workdir):
        with Lease(workdir / ".lock") as lease:
            _check_tensorstore(workdir)
            yield lease.check
    else:
        with _local_lock(workdir):
            yield _never_lost


@contextlib.contextmanager
def _local_lock(workdir: AnyPath) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"cannot write {workdir}: {e.strerror or e}") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"workdir {workdir} is in use by another run: wait for it, or choose another") from None
        except OSError:
            pass
        yield


def _check_tensorstore(workdir: AnyPath) -> None:
    """Raises UserError if TensorStore, which writes the arrays of checkpoints, cannot write; its login is its own."""
    probe = workdir / ".probe"
    try:
        store = tensorstore.KvStore.open(f"{workdir}/").result()
        store.write(probe.name, b"").result()
        store.delete_range(tensorstore.KvStore.KeyRange(probe.name, f"{probe.name}0")).result()
    except (ValueError, OSError) as e:
        raise UserError(f"TensorStore, which writes checkpoints, cannot write {probe}: {e}") from None


def _never_lost() -> None:
    """A local lock ends with the process, and not before."""


def _read(path: AnyPath) -> dict[str, Any]:
    try:
        config = parse_json(read_text(path))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}; choose another workdir") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a config: choose another workdir")
    return config


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], workdir: AnyPath) -> None:
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
    """`{a: {b: 1}}` -> `{a.b: 1}`, `{a: [{b: 1}]}` -> `{a[0].b: 1}`; an empty group stays: it is no missing group."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            out |= _flat({f"{key}[{i}]": item for i, item in enumerate(value)}, prefix)
            continue
        nested = isinstance(value, dict) and value
        out.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return out
