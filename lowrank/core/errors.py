"""The errors that a user can put right, and helpers for their texts: the nearest valid name, and plurals."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. Its text is one line: the culprit, the allowed values, the remedy. Commands print no traceback."""


class TooLong(UserError):
    """A record that does not fit into a row, whatever may be cut."""


class InUse(UserError):
    """A folder that another run holds. The same command may succeed when that run has ended."""


class Diverged(UserError):
    """A run whose loss or gradient is not finite."""


def nearest(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the option closest to `word`, or an empty string."""
    close = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(kind: str, word: str, options: Iterable[str]) -> UserError:
    """The error for a name that is not one of `options`: it lists them and suggests the nearest."""
    options = sorted(str(o) for o in options)
    return UserError(f"unknown {kind} {word!r}{nearest(word, options)}; known: {', '.join(options) or 'none'}")


def plural(count: int, noun: str) -> str:
    """`"1 token"`, `"2048 tokens"`: a count with its noun in the number that agrees."""
    return f"{count} {noun if count == 1 else _plural_of(noun)}"


def _plural_of(noun: str) -> str:
    if noun.endswith("f"):
        return f"{noun[:-1]}ves"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
