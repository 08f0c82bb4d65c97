"""What Orbax's threads would print after a failed write that one error has told of."""

import logging as std_logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import logging


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
