"""A text as its tokens are drawn: no half characters, and nothing of a string that ends the text."""

from collections.abc import Sequence

from lowrank.core.errors import UserError
from lowrank.core.typing import Tokenizer

HALF = "\ufffd"  # what the bytes of half a character decode to


class TextStream:
    """The text of tokens that arrive one by one, up to the first of the `stop` strings."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), stop_ids: Sequence[int] = ()) -> None:
        """`stop_ids` are the tokens that end a text and are no part of it. Raises UserError for an empty string."""
        if "" in stop:
            raise UserError("a stop string is empty, which would end every text before its first character")
        self._tokenizer, self._stop, self._stop_ids, self._written = tokenizer, tuple(stop), frozenset(stop_ids), 0

    def text(self, tokens: Sequence[int]) -> str:
        """The text of all tokens, up to the first stop string."""
        text = self._tokenizer.decode([t for t in tokens if t not in self._stop_ids])
        return text[: min((i for i in map(text.find, self._stop) if i >= 0), default=len(text))]

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string is in the text."""
        text = self._tokenizer.decode([t for t in tokens if t not in self._stop_ids])
        return any(s in text for s in self._stop)

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """What the text of all `tokens` so far adds to what was returned before.

        Until the `last` call, the bytes of half a character and what may begin a stop string are held back.
        """
        text = self.text(tokens)
        if not last and not self.is_complete(tokens):
            text = text.rstrip(HALF)
            text = text[: len(text) - max((_overlap(text, s) for s in self._stop), default=0)]
        added, self._written = text[self._written :], max(self._written, len(text))
        return added


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
