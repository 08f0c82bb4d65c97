"""Sentinels, the tokens that mark the parts of a document whose order is changed, and the sequences that they are in.

Shapes: N tokens of one sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays, Tokenizer

Ids = list[int]


def token_id(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of the token that is written `name`; None where the vocabulary has none."""
    ids = tokenizer.encode(name)
    return ids[0] if len(ids) == 1 and tokenizer.token(ids[0]) == name else None


def token_ids(tokenizer: Tokenizer, names: Sequence[str], key: str) -> tuple[int, ...]:
    """The ids of the tokens that the option `key` names. Raises UserError for one that the vocabulary lacks."""
    ids = [token_id(tokenizer, name) for name in names]
    for name, found in zip(names, ids, strict=True):
        if found is None:
            raise UserError(f"{key}: {name!r} is not one token of the vocabulary: name one that is")
    return tuple(i for i in ids if i is not None)


def known_family(tokenizer: Tokenizer, families: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of the families of names whose tokens the vocabulary has; () where it has none of them."""
    return next((names for names in families if all(token_id(tokenizer, name) is not None for name in names)), ())


def check_unspelled(ids: Ids, sentinels: Sequence[int], tokenizer: Tokenizer, key: str, where: str) -> None:
    """Raises UserError naming `where` if the `ids` of its text hold one of the sentinels of the group `key`."""
    if found := set(sentinels) & set(ids):
        name = tokenizer.token(min(found))
        raise UserError(f"{where}: the text holds {name!r}, which {key} takes for a sentinel: leave it out")


def sequence_ids(sequence: Mapping[str, Any]) -> Ids:
    """The ids of a sequence: its first token and all targets."""
    return [int(sequence["tokens"][0]), *map(int, sequence["targets"])]


def split_ends(sequence: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """`(start, body)` of a sequence: the token that starts a text, if it is there, and the ids up to the end token."""
    ids = sequence_ids(sequence)
    start = ids[:1] if ids[0] == tokenizer.bos_id else []
    return start, ids[len(start) : -1] if ids[-1] == tokenizer.eos_id else ids[len(start) :]


def asked_sequence(before: Ids, learned: Ids, everything: bool) -> HostArrays:
    """The sequence of two parts, of which the second is learned, or `everything`."""
    ids = [*before, *learned]
    asked = np.arange(1, len(ids)) >= len(before)  # whether a target is of the second part
    weights = np.ones(len(asked)) if everything else asked
    return {
        "tokens": np.asarray(ids[:-1], np.int32),
        "targets": np.asarray(ids[1:], np.int32),
        "weights": weights.astype(np.float32),
        "prompt": np.arange(len(asked)) < (1 if everything else len(before)),
    }
