"""Preemption: a run stops in good order at SIGTERM, which a cluster sends before it takes a machine away."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Whether SIGTERM has come: `with StopSignal() as stop: ... if stop.requested(step): save and leave`.

    A second SIGTERM kills the process. In a multi-process run JAX's preemption service catches the signal, and
    `requested` returns True on all processes at the same step. Outside the main thread, no handler is installed.
    """

    def __enter__(self) -> "StopSignal":
        self._flag = False
        self._service = jax.process_count() > 1
        self._mine = not self._service and threading.current_thread() is threading.main_thread()
        if self._mine:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._mine:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: Any) -> None:
        self._flag = True
        signal.signal(signal.SIGTERM, self._before)

    def requested(self, step: int) -> bool:
        """Whether to save after `step` and stop. Every process calls it once per step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._service else self._flag
