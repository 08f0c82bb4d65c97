"""Preemption: a run stops in good order at SIGINT, and at SIGTERM, which a cluster sends before it takes a machine."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Whether SIGTERM or SIGINT has come: `with StopSignal() as stop: ... if stop.requested(step): save and leave`.

    The second one ends the process. In a multi-process run JAX's preemption service catches SIGTERM, and `requested`
    returns True on all processes at the same step. Outside the main thread, no handler is installed.
    """

    def __enter__(self) -> "StopSignal":
        self._flag, self._service = False, jax.process_count() > 1
        mine = SIGNALS[self._service :] if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in mine}
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self._flag = True
        self.__exit__()
        if self._service:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to save after `step` and stop. Every process calls it once per step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._service else self._flag
