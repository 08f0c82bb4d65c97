"""A trace of a run's steps for xprof: what each device and the host do, and when."""

from typing import Any

import jax

from lowrank.core.errors import UserError, plural
from lowrank.core.mirror import Mirror
from lowrank.core.paths import PathLike, as_path

PROFILE = "profile"  # the folder of traces in a run's folder
WARM_UP = 1  # the first step of a process loads programs and fills caches, and would hide the others


class Profile:
    """Traces `steps` steps after the first one of this process: `with Profile(...) as profile: profile.before(step)`.

    The trace is written to the folder `profile` of the run, for `xprof --logdir=DIR/profile` or TensorBoard. In a run
    of many processes each one writes a file of its own.
    """

    def __init__(self, folder: PathLike, steps: int, remaining: int):
        """Raises UserError if the run's `remaining` steps are fewer than the traced ones and the first one."""
        if steps < 0 or (steps and steps > remaining - WARM_UP):
            most = max(0, remaining - WARM_UP)
            raise UserError(
                f"--profile={steps} is not in 0..{most}: {plural(remaining, 'step')} left, of which the first warms up"
            )
        self._mirror, self._steps, self._seen, self._tracing = Mirror(as_path(folder) / PROFILE), steps, 0, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._mirror.copy()
            self._tracing = False

    def before(self, step: int, previous: Any = None) -> Any:
        """A context for step number `step`, under which the trace shows it.

        The trace begins, and ends, when `previous`, the arrays of the step before, are computed.
        """
        traced = self._seen - WARM_UP
        self._seen += 1
        if self._steps and traced in (0, self._steps):
            jax.block_until_ready(previous)
        if self._steps and traced == 0:
            jax.profiler.start_trace(str(self._mirror.local))
            self._tracing = True
        if traced == self._steps:
            self.__exit__()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)
