"""Text into token ids that fit into a row: a long text is cut, an answer never."""

from collections.abc import Callable, Sequence

import numpy as np

from lowrank.core.errors import TooLong, plural
from lowrank.core.typing import Tokenizer
from lowrank.data.chat import Piece

Ids = tuple[list[int], list[bool]]  # token ids, and whether each of them is to be learned
_CHARACTERS = 6  # an upper bound of a token's mean length: more of a very long text is not encoded
_WORD = 40  # a cut moves back to the start of a word, if one starts within this many characters


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece], start: bool = True) -> Ids:
    """The ids of the pieces' text as a whole, with `start` after the token that the tokenizer puts before a text.

    A chat template writes that token itself, if there is to be one. A token is learned if its last character is.
    """
    learns = np.concatenate([np.full(len(text), learn) for text, learn in pieces] + [[False]])
    ids, offsets = tokenizer.encode_offsets("".join(text for text, _ in pieces))
    learned = [bool(learns[max(begin, end - 1)]) for begin, end in offsets]
    first = tokenizer.encode_special("")[:1]
    if start and first == [tokenizer.bos_id] != ids[:1]:
        return [*first, *ids], [False, *learned]
    return ids, learned


def fit(
    build: Callable[[str | None], Ids], tokenizer: Tokenizer, text: Callable[[], str], limit: int, where: str
) -> tuple[Ids, str | None]:
    """`(build(cut), cut)` with at most `limit` ids.

    `cut` is None where the whole text fits, else a start of `text()` about as long as fits. Raises TooLong naming
    `where` when the rest of the record is too long even without the text.
    """
    whole = text()
    head = whole[: _CHARACTERS * limit]
    offsets = tokenizer.encode_offsets(head)[1] if len(head) < len(whole) else []
    if len(offsets) <= limit:  # short enough to try
        encoded = build(None)
        if len(encoded[0]) <= limit:
            return encoded, None
        offsets = tokenizer.encode_offsets(whole)[1]
    around = len(build("")[0])
    if around > limit:
        raise TooLong(
            f"{where}: {plural(around, 'token')} without the text that may be cut; at most {limit} fit: "
            "raise data.seq_len, or set data.too_long=drop"
        )
    keep, excess = limit - around, 1
    while excess > 0:
        cut = shorten(whole, offsets[:keep][-1][1]) if keep > 0 and offsets else ""
        encoded = build(cut)
        excess = len(encoded[0]) - limit
        keep -= excess
    return encoded, cut


def shorten(text: str, size: int) -> str:
    """At most the first `size` characters of `text`, ending with a whole word if its words are short."""
    if size >= len(text):
        return text
    head = text[:size]
    words = head.rstrip() if text[size].isspace() else head[: max(head.rfind(" "), head.rfind("\n"), 0)].rstrip()
    return words if words and size - len(words) <= _WORD else head
