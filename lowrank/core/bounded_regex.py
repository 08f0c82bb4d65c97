"""Regular expressions of strangers, bounded in time: a pattern that backtracks without end is an error.

The package `regex` reads the syntax of `re`, and can be stopped inside of a match.
"""

import contextlib
import contextvars
import functools
import time
from collections.abc import Iterator
from typing import Any

import regex

from lowrank.core.errors import UserError

SECONDS, TOTAL = 1.0, 3.0  # of the processor at most, for one match and for all inside a `budget`
_left: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar("left", default=None)


@contextlib.contextmanager
def budget(seconds: float = TOTAL) -> Iterator[None]:
    """All matches inside the block together take at most `seconds`; a block inside another shares its seconds."""
    token = _left.set(_left.get() or [seconds])
    try:
        yield
    finally:
        _left.reset(token)


def fullmatch(pattern: str, text: str) -> Any:
    """As `re.fullmatch`. Raises UserError for what is no regular expression, or takes too long."""
    return _bounded(_compiled(pattern).fullmatch, pattern, text)


def match(pattern: str, text: str) -> Any:
    """As `re.match`, with the errors of `fullmatch`."""
    return _bounded(_compiled(pattern).match, pattern, text)


def _bounded(method: Any, pattern: str, text: str) -> Any:
    left, start = _left.get(), time.thread_time()
    try:
        if left and left[0] <= 0:
            raise TimeoutError
        return method(text, timeout=SECONDS)
    except TimeoutError:
        advice = "write it without repeats inside of repeats"
        raise UserError(f"the pattern {_spelled(pattern)} takes too long to match {text!r}: {advice}") from None
    finally:
        if left:
            left[0] -= time.thread_time() - start


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as e:
        raise UserError(f"the pattern {_spelled(pattern)} is not a regular expression: {e}") from None


def _spelled(pattern: str) -> str:
    return repr(pattern if len(pattern) < 200 else f"{pattern[:196]} ...")
