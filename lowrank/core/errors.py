"""One error type for what a user can put right, and the nearest valid name to suggest."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that names the culprit. The launchers print it without a traceback."""


class Diverged(UserError):
    """A run whose loss or gradient is not finite."""


def nearest(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the option closest to `word`, or an empty string."""
    close = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(kind: str, word: str, options: Iterable[str]) -> UserError:
    """An error for a name that is not one of `options`; it lists them and suggests the nearest."""
    options = sorted(str(o) for o in options)
    return UserError(f"unknown {kind} {word!r}{nearest(word, options)}; known: {', '.join(options) or 'none'}")
