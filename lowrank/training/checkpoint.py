"""Checkpoints `{leaf name: array}` plus a JSON `meta`, written by Orbax in the background, whole or not at all.

A step is written under a temporary name and renamed when it is complete, so a crash, a kill or a full disk leaves the
steps before it as they were. Only arrays and JSON are stored; nothing is pickled.
"""

import contextlib
import json
import logging as std_logging
import os
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
from lowrank.core.tree import check_same_names
from lowrank.core.typing import Arrays

_TEMPORARY = ".orbax-checkpoint-tmp"
# Orbax divides what is replicated among those that hold it, by little programs: for an adapter those take the time.
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20))
)


class Checkpointer:
    """The checkpoints of one run: one folder a step, the newest `keep` of them.

    Every process of a multi-process run makes one and calls the same methods in the same order.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int = 0, keep: int = 2):
        """Opens or creates `directory` and clears away what an interrupted save left there.

        One run at a time: opening the folder of a run that is saving at that moment makes its save fail.

        Args:
          directory: where the steps are; a local path or `gs://...`.
          every: steps between periodic checkpoints (see `due`); 0 for none.
          keep: how many steps stay on disk, at least 1.
        """
        if every < 0 or keep < 1:
            raise UserError(f"checkpoint.every={every} must be >= 0 and checkpoint.keep={keep} must be >= 1")
        self.directory = epath.Path(directory).absolute()
        self.every = every
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear()  # Orbax clears in the background, where two managers, or this and a save, meet
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
        """The complete checkpoints on disk, oldest first; one still being written is not among them."""
        return sorted(ocp.utils.checkpoint_steps(self.directory))

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, arrays: Arrays, meta: Mapping[str, Any], block: bool = False, *, host: Any = None
    ) -> None:
        """Starts writing step `step`; the arrays may be donated or deleted as soon as this returns.

        A step that is there, or on its way, is left alone. If the write before this one failed, this call says so.

        Args:
          step: the number of finished training steps.
          arrays: leaf name -> array of any float or integer dtype but uint4, sharded in any way.
          meta: JSON values, the same on every process: step, config, seed.
          host: JSON values of this process alone: its data iterator's state.
          block: return when the checkpoint is complete.

        Raises:
          UserError: the write failed, for instance because the disk is full; the steps before it are intact.
        """
        if step in self._manager.all_steps():
            return self.wait() if block else None
        _storable(arrays)
        document = json.loads(
            json.dumps({"meta": dict(meta), "hosts": gather_values(host)})
        )  # fails here, not in a thread
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(dict(arrays)), meta=ocp.args.JsonSave(document))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as e:
            raise self._failure(e) from e
        return self.wait() if block else None

    def check(self) -> None:
        """Raises UserError when a write in the background has failed; does not wait for one that goes on."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failure(e) from e

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` of a step; its key `host` has what this process gave as `host`."""
        self._exists(step)
        document = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        return {**document["meta"], "host": own_value(document["hosts"])}

    def restore(self, step: int, like: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[Arrays, dict[str, Any]]:
        """`(arrays, meta)` of a step, each array in the sharding that `like` gives it, on whatever mesh that is.

        Raises:
          UserError: no such step; a leaf is missing, extra or of another shape or dtype; a file cannot be read.
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
        """Waits for the last write and frees the threads; raises UserError when that write failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # Orbax repeats here what `wait` has said
                self._manager.close()
            if not self._failed:  # else its threads may still have something to say
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
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are {self.steps() or 'none'}")

    def _clear(self) -> None:
        """Deletes half-written steps; on `gs://`, where they have no name of their own, Orbax does."""
        if jax.process_index() == 0:
            for half in self.directory.glob(f"*{_TEMPORARY}*"):
                half.rmtree(missing_ok=True)

    def _failure(self, error: Exception) -> UserError:
        """Forgets the failed step, deletes its half-written folder and says what is left."""
        self._failed = True
        with contextlib.suppress(Exception):  # what else failed with it
            self._manager.wait_until_finished()
        self._clear()
        self._manager.reload()
        last = self.latest()
        kept = "there is no earlier one" if last is None else f"step {last} is intact"
        return UserError(f"a checkpoint could not be written to {self.directory}: {_reason(error)}; {kept}")


def _spell(leaf: Any) -> str:
    """`float32[2,3]`."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _how(want: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    sharding = want.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=want.shape, dtype=want.dtype, strict=True)


def _storable(arrays: Arrays) -> None:
    for name, leaf in arrays.items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.size == 0 or leaf.dtype.name == "uint4":
            raise UserError(f"leaf {name!r} is {leaf.dtype}{list(leaf.shape)}, which a checkpoint cannot hold")


def _reason(error: BaseException) -> str:
    """The cause in a few words: Orbax's messages run over many lines."""
    text = str(error)
    for phrase in ("No space left on device", "File too large", "Permission denied", "Disk quota exceeded"):
        if phrase in text:
            return phrase.lower()
    first = (text.strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def quiet_orbax() -> Callable[[], None]:
    """Keeps the threads that a failed write takes down from printing their tracebacks: one UserError says it.

    Returns what undoes it. TensorStore's threads print through `sys.unraisablehook`, Orbax's through two loggers, and
    Python warns, whenever it gets to collect them, of writes that JAX no longer started: that filter stays.
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
