"""Splits of files as TFDS writes them: `train`, `test[:100]`, `train[80%:]`, `train+validation`."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import tensorflow_datasets as tfds

from lowrank.core.errors import UserError, nearest


class Split(Protocol):
    """Anything that has this many records."""

    @property
    def num_examples(self) -> int:
        """The number of records."""


class Slice(NamedTuple):
    """The records `begin`, ..., `end - 1` of a split."""

    split: str
    begin: int
    end: int


def parse_split(name: str, split: str, known: Mapping[str, Split]) -> list[Slice]:
    """The slices that the expression `split` stands for, in order.

    Raises UserError naming the dataset `name` for an expression that names no `known` split, or that TFDS refuses.
    """
    try:
        parts = tfds.core.splits.AbstractSplit.from_spec(split).to_absolute(known)
    except UserError:  # a record of a file
        raise
    except (ValueError, NotImplementedError) as e:
        raise bad_split(name, split, known, e) from None
    ranges = ((p.splitname, range(known[p.splitname].num_examples)[p.from_ or 0 : p.to]) for p in parts)
    return [Slice(of, found.start, found.stop) for of, found in ranges]


def bad_split(name: str, split: str, known: Mapping[str, object], error: Exception) -> UserError:
    """The error for a split expression that names no `known` split, or that TFDS refuses for another reason."""
    reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
    reason = "" if reason.startswith("Unknown split") else f" ({reason})"
    listed = f"its splits: {', '.join(known)}"
    if not reason and list(known) == ["train"]:
        listed += "; name a folder with a file for each split, or a part of this one, as train[:90%] and train[90%:]"
    return UserError(f"{name} has no split {split!r}{nearest(split, known)}{reason}; {listed}")
