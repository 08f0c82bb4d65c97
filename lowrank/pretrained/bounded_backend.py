"""A tokenizer backend whose vocabulary has tokens for which the model has no row."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers

from lowrank.core.errors import UserError, plural

# A text of fewer characters than SHORT is read at once. For others, a tokenizer has SECONDS and one more for each
# SPEED characters, of which it reads ten times as many in a second.
SHORT, SECONDS, SPEED, POLL = 1000, 20.0, 100_000, 0.05


class BoundedBackend:
    """A `tokenizers.Tokenizer` that refuses texts with a token of id `rows` or more; all else is the backend's."""

    def __init__(self, backend: tokenizers.Tokenizer, rows: int):
        self._backend, self._rows = backend, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, *args: Any, **how: Any) -> tokenizers.Encoding:
        """As the backend's. Raises UserError naming a token without a row."""
        return self._checked(self._backend.encode(*args, **how))

    def encode_batch(self, *args: Any, **how: Any) -> list[tokenizers.Encoding]:
        """As the backend's. Raises UserError naming a token without a row."""
        return [self._checked(encoding) for encoding in self._backend.encode_batch(*args, **how)]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None if the model has no row for it."""
        index = self._backend.token_to_id(token)
        return index if index is None or index < self._rows else None

    def get_vocab(self) -> dict[str, int]:
        """The tokens that have a row, and their ids."""
        return {token: index for token, index in self._backend.get_vocab().items() if index < self._rows}

    def _checked(self, encoding: tokenizers.Encoding) -> tokenizers.Encoding:
        index = max(encoding.ids, default=0)
        if index >= self._rows:
            token = self._backend.id_to_token(index)
            size = plural(self._rows, "token")
            raise UserError(f"a text holds the token {token!r} of id {index}, and the model has {size}")
        return encoding


def encode(backend: Any, text: str, pair: str | None = None, **how: Any) -> tokenizers.Encoding:
    """As the backend's. Raises UserError where the library panics, or takes too long for the text."""
    if len(text) + len(pair or "") < SHORT:
        return without_panic(backend.encode, text, pair, **how)
    return encode_batch(backend, [text if pair is None else (text, pair)], **how)[0]


def encode_batch(backend: Any, texts: Sequence[str | tuple[str, str]], **how: Any) -> list[tokenizers.Encoding]:
    """As the backend's, with the errors of `encode`.

    The library reads in a thread, without Python's lock. Nothing can stop it: where it takes too long, it goes on until
    the process ends.
    """
    size = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
    if size < SHORT:
        return without_panic(backend.encode_batch, list(texts), **how)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_caught(backend.encode_batch, list(texts), how)), daemon=True)
    start, allowed = (time.monotonic(), time.process_time()), SECONDS + size / SPEED
    thread.start()
    while not found:
        thread.join(POLL)
        # Of both clocks, as other processes may take the processor, and other threads time of this one.
        if not found and min(time.monotonic() - start[0], time.process_time() - start[1]) > allowed:
            text = f"{plural(size, 'character')}, from {str(texts[0])[:40]!r} on"
            raise UserError(
                f"the tokenizer takes more than {allowed:.0f} s for {text}, most likely by a regular expression"
            )
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _caught(method: Callable[..., Any], texts: Any, how: Any) -> Any:
    try:
        return without_panic(method, texts, **how)
    except BaseException as e:
        return e


def without_panic(method: Callable[..., Any], *args: Any, **how: Any) -> Any:
    """What a method of a backend returns. Raises UserError where the library panics.

    Oniguruma ends a search after ten million steps back, and the library then raises what is no Exception.
    """
    try:
        return method(*args, **how)
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        reason = " ".join(str(e).split())
        raise UserError(f"the tokenizer fails on this text, most likely by a regular expression: {reason}") from None


def bounded(backend: Any, rows: int) -> Any:
    """`backend` itself if each of its tokens has one of the model's `rows`, else a BoundedBackend."""
    ids: Sequence[int] = backend.get_vocab().values()
    return backend if max(ids, default=0) < rows else BoundedBackend(backend, rows)
