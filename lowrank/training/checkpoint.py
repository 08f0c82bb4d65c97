"""The checkpoints of a run: `{leaf name: array}` and a JSON `meta`, which Orbax writes in the background.

A step is written under a temporary name and renamed when it is complete, so a crash, a kill or a full disk leaves the
earlier steps as they were. Only arrays and JSON are stored; nothing is pickled.
"""

import contextlib
import json
import logging as std_logging
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from lowrank.core.errors import UserError
from lowrank.core.multihost import gather_values, own_value
from lowrank.core.paths import PathLike, as_path, in_bucket
from lowrank.core.tree import check_same_names
from lowrank.core.typing import Arrays

_TEMPORARY = ".orbax-checkpoint-tmp"
# Orbax compiles a small program per replicated array to divide it among its devices. Small arrays are written whole:
# for an adapter, the compilation of these programs would take most of the time of a save.
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20))
)


class Checkpointer:
    """The checkpoints of one run: one folder per step, of which the newest `keep` stay on disk.

    Every process of a multi-process run creates a checkpointer and calls the same methods in the same order.
    """

    def __init__(self, directory: PathLike, every: int = 0, keep: int = 2):
        """Opens or creates `directory` and deletes the half-written steps of an interrupted save.

        Only one run may use the folder at a time: to open the folder of a run that is saving makes its save fail.

        Args:
          directory: the folder of the steps, a local path or `gs://BUCKET/...`.
          every: the number of steps between periodic checkpoints (see `due`); 0 for no periodic checkpoint.
          keep: the number of steps that stay on disk, at least 1.

        Raises:
          UserError: `every` or `keep` is out of range, or the folder cannot be used.
        """
        if every < 0 or keep < 1:
            raise UserError(f"checkpoint.every={every} must be >= 0 and checkpoint.keep={keep} must be >= 1")
        path = as_path(directory)
        self.directory = epath.Path(path if in_bucket(path) else path.absolute())
        self.every = every
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear()  # not left to Orbax, which deletes in the background, beside another manager or a save
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_names=("arrays", "meta"),
                item_handlers={
                    "arrays": ocp.PyTreeCheckpointHandler(type_handler_registry=_HANDLERS),
                    "meta": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
                ),
            )
        except OSError as e:
            raise UserError(f"checkpoint folder {self.directory} cannot be used: {_reason(e)}") from e
        self._loud, self._failed = quiet_orbax(), False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except UserError as e:
            if error is None:
                raise
            error.add_note(str(e))

    def due(self, step: int) -> bool:
        """Whether a periodic checkpoint falls on `step`."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints on disk, oldest first; a step in progress is not among them."""
        return sorted(ocp.utils.checkpoint_steps(self.directory))

    def latest(self) -> int | None:
        """The newest complete step, or None without a checkpoint."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, arrays: Arrays, meta: Mapping[str, Any], block: bool = False, *, host: Any = None
    ) -> None:
        """Starts to write step `step`; the arrays may be donated or deleted as soon as the call returns.

        A step that exists, or that is being written, is not written again.

        Args:
          step: the number of finished training steps.
          arrays: leaf name -> array of any float or integer dtype except uint4, with any sharding.
          meta: JSON values that are the same on every process: the step, the config.
          block: return only when the checkpoint is complete.
          host: JSON values of this process alone, such as the state of its data iterator.

        Raises:
          UserError: this write or the previous one failed, for instance because the disk is full; the earlier steps
            are intact.
        """
        if step in self._manager.all_steps():
            return self.wait() if block else None
        _storable(arrays)
        document = json.loads(
            json.dumps({"meta": dict(meta), "hosts": gather_values(host)})
        )  # a value that JSON cannot express fails here and not in a thread
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(dict(arrays)), meta=ocp.args.JsonSave(document))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as e:
            raise self._failure(e) from e
        return self.wait() if block else None

    def check(self) -> None:
        """Raises UserError if a write in the background has failed; does not wait for a write in progress."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when every write is complete. Raises UserError if one has failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failure(e) from e

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` of a step; its key `host` holds the values that this process passed as `host`."""
        self._exists(step)
        document = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        return {**document["meta"], "host": own_value(document["hosts"])}

    def restore(self, step: int, like: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[Arrays, dict[str, Any]]:
        """`(arrays, meta)` of a step; each array has the sharding of its shape in `like`, on any mesh.

        Raises:
          UserError: the step does not exist; a leaf is missing, extra or of another shape or dtype; or a file cannot be
            read.
        """
        meta, found = self.meta(step), self._stored(step)
        where = f"checkpoint {self.directory / str(step)}"
        check_same_names(like, found, where)
        for name, want in like.items():
            if (have := _spell(found[name])) != _spell(want):
                raise UserError(f"leaf {name!r} is {have} in {where} but {_spell(want)} in this run")
        template = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in like.items()}
        how = {name: _how(w) for name, w in like.items()}
        arrays = self._read(step, arrays=ocp.args.PyTreeRestore(template, restore_args=how))["arrays"]
        return arrays, meta

    def close(self) -> None:
        """Waits for the last write and ends the threads. Raises UserError if that write has failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # Orbax repeats here the error that `wait` has raised
                self._manager.close()
            if not self._failed:  # after a failure, its threads may still print
                self._loud()

    def _stored(self, step: int) -> dict[str, Any]:
        try:
            return dict(self._manager.metadata(step).item_metadata["arrays"].tree)
        except Exception as e:
            raise UserError(f"checkpoint {self.directory / str(step)} cannot be read: {_reason(e)}") from e

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:
            raise UserError(f"checkpoint {self.directory / str(step)} cannot be read: {_reason(e)}") from e

    def _exists(self, step: int) -> None:
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.directory} lacks a checkpoint of step {step}; choose one of its steps: {known}")

    def _clear(self) -> None:
        """Deletes half-written steps. On `gs://` they do not have a name of their own, and Orbax deletes them."""
        if jax.process_index() == 0:
            for half in self.directory.glob(f"*{_TEMPORARY}*"):
                half.rmtree(missing_ok=True)

    def _failure(self, error: Exception) -> UserError:
        """Deletes the half-written folder of the failed step and returns an error that names the newest intact step."""
        self._failed = True
        with contextlib.suppress(Exception):  # the other arrays of the same write may have failed as well
            self._manager.wait_until_finished()
        self._clear()
        self._manager.reload()
        last = self.latest()
        survivor = "the run has no earlier checkpoint" if last is None else f"step {last} is intact"
        return UserError(f"a checkpoint could not be written to {self.directory}: {_reason(error)}; {survivor}")


def _spell(leaf: Any) -> str:
    """The dtype and shape of a leaf, such as `float32[2,3]`."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _how(want: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    sharding = want.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=want.shape, dtype=want.dtype, strict=True)


def _storable(arrays: Arrays) -> None:
    for name, leaf in arrays.items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.size == 0 or leaf.dtype.name == "uint4":
            raise UserError(f"leaf {name!r} is {leaf.dtype}{list(leaf.shape)}, which a checkpoint cannot hold")


def _reason(error: BaseException) -> str:
    """The cause in a few words, as Orbax's messages have many lines."""
    text = str(error)
    for phrase in ("No space left on device", "File too large", "Permission denied", "Disk quota exceeded"):
        if phrase in text:
            return phrase.lower()
    first = (text.strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def quiet_orbax() -> Callable[[], None]:
    """Hides the tracebacks that the threads of a failed write print, as one UserError reports the failure.

    Returns a function that undoes this. TensorStore's threads print through `sys.unraisablehook`, Orbax's through two
    loggers. Python also warns of writes that JAX never started when it collects them, at any later time: the filter of
    that warning stays.
    """
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)
    loggers, before = (logging.get_absl_logger(), std_logging.getLogger("asyncio")), sys.unraisablehook

    def shown(record: std_logging.LogRecord) -> bool:
        return record.levelno < std_logging.ERROR or not ("orbax" in record.pathname or record.name == "asyncio")

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(shown)
        sys.unraisablehook = before if sys.unraisablehook is show else sys.unraisablehook

    for logger in loggers:
        logger.addFilter(shown)
    sys.unraisablehook = show
    return undo
