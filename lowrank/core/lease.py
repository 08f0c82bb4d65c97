"""The right of one process to write to a folder of a bucket, which has no locks that end with a process.

The owner renews an object by its generation. A process that is killed no longer renews it, and the next owner replaces
the object once it is `SECONDS` old by the store's clock. An owner that was paused for so long finds another generation.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from lowrank.core.errors import InUse, UserError
from lowrank.core.generations import Version, create_exclusive, read_version, replace_if, store_time
from lowrank.core.paths import PathLike, as_path

SECONDS = 60.0


class Lease:
    """A context manager: the lease is taken, renewed by a thread, and given back."""

    def __init__(self, path: PathLike, seconds: float = SECONDS):
        self.path, self.seconds = as_path(path), seconds
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._generation, self._lost, self._renewed = 0, False, time.monotonic()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "Lease":
        """Takes the lease. Raises UserError if another process holds it, or if the bucket cannot be written."""
        found = self._read()
        if found and not self._is_free(found):
            self._wait(found)
        data = self._data(self._owner)
        taken = replace_if(self.path, data, found.generation) if found else create_exclusive(self.path, data)
        self._adopt(taken)
        if self._lost:
            raise self._in_use()
        self._thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._end.set()
        self._thread.join()
        with self._lock, contextlib.suppress(UserError):  # without a reply, the lease ends by itself
            if not self._lost:
                replace_if(self.path, self._data(None), self._generation)

    def check(self) -> None:
        """Raises UserError if another process may have the lease: this one was paused, or cannot reach the bucket."""
        if time.monotonic() - self._renewed > self.seconds * 3 / 4:
            self._renew()
        if self._lost:
            raise self._in_use()

    def _keep(self) -> None:
        while not self._lost and not self._end.wait(self.seconds / 4):
            try:
                self._renew()
            except (OSError, UserError):  # the store does not answer: `check` raises if that lasts
                continue

    def _renew(self) -> None:
        with self._lock:
            began = time.monotonic()
            self._adopt(replace_if(self.path, self._data(self._owner), self._generation))
            self._renewed = began

    def _adopt(self, generation: int | None) -> None:
        """Notes the generation that was written; None may also be a reply that came only to a second request."""
        if generation is None and (found := self._read()) and json.loads(found.data) == self._owner:
            generation = found.generation
        self._generation, self._lost = generation or 0, generation is None

    def _wait(self, found: Version) -> None:
        """Waits until the lease of a killed process has ended. Raises UserError as soon as a process renews it."""
        left = found.modified + self.seconds - store_time(self.path.parent)
        if left > 0:
            print(f"waiting up to {left:.0f} s: a killed run may have held {self.path}", file=sys.stderr)
        give_up = time.monotonic() + left
        while (now := time.monotonic()) < give_up:
            time.sleep(min(1.0, self.seconds / 20, give_up - now))
            current = self._read()
            if current is None or current.generation != found.generation:
                raise self._in_use()

    def _in_use(self) -> InUse:
        folder, holder = self.path.parent, self._holder()
        return InUse(f"workdir {folder} is in use by another run ({holder}): wait for it, or choose another")

    def _holder(self) -> str:
        found = self._read()
        owner = json.loads(found.data) if found else None
        return f"process {owner['pid']} on {owner['host']}" if owner else "which has just ended"

    def _read(self) -> Version | None:
        try:
            return read_version(self.path)
        except OSError as e:
            raise UserError(f"cannot read {self.path}: {e.strerror or e}") from e

    @staticmethod
    def _data(owner: dict[str, Any] | None) -> bytes:
        return json.dumps(owner).encode()

    @staticmethod
    def _is_free(found: Version) -> bool:
        return json.loads(found.data) is None
