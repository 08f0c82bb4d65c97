"""What a row of a batch holds, and how a record becomes rows: an objective hands this to the loader."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data.config import DataConfig
from lowrank.data.sources import Source
from lowrank.data.templates import Record

Shape = tuple[int, ...]
CheckCounts = Callable[[Mapping[str, int], str], None]
EncodedSequence = HostArrays | tuple[HostArrays, ...]  # one sequence, or those that make up one row together
PAD_ID = "pad_id"  # a padding that is the tokenizer's
RECORD = "record"  # the array of the records' numbers, which the loader makes where a row format lists it


class Encoder(Protocol):
    """Records into sequences that fit into a row."""

    labels: tuple[str, ...]  # the names of the classes in order; empty without classes

    @property
    def document(self) -> bool:
        """Whether a record is one text in which every token is learned, so that no field can be missing."""

    def __call__(self, record: Record, where: str) -> tuple[list[EncodedSequence], bool]:
        """`(sequences, whether the text was shortened)`.

        Raises UserError naming `where` for a record that cannot be used, and TooLong for one that cannot fit.
        """

    def count(self, sequence: EncodedSequence) -> dict[str, int]:
        """What the log says of the sequences of a dataset, as counts that are added up."""

    def show(self, sequence: EncodedSequence) -> str:
        """The sequence as a reader understands it."""

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks a field; nothing is encoded."""

    def example(self, record: Record, where: str, reserve: int) -> dict[str, Any]:
        """The record for evaluation, its text shortened so that `reserve` new tokens fit into a row."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a sequence. Where `per_token`, it has one value per token, else one value in all."""

    dtype: str
    per_token: bool = True
    padding: float | str = 0  # the value on the positions after the last token; PAD_ID: the tokenizer's
    filler: float | None = None  # the value on rows that only fill up the last batch; None: the last row's


TOKENS, INDEX = ArraySpec("int32", padding=PAD_ID), ArraySpec("int32")


@dataclasses.dataclass(frozen=True, eq=False)
class RowFormat:
    """What a row of a batch holds.

    The loader makes `segments` and, where they are listed, `positions` out of the lengths of the sequences, and adds
    `valid` `[B]`, which is 0 on the rows that only fill up the last batch.
    """

    name: str  # the objective that saved states of the loader name
    encoder: Callable[[DataConfig, Tokenizer, Source], Encoder]
    arrays: Mapping[str, ArraySpec]
    packable: bool = False  # whether several sequences may share a row
    members: int = 0  # sequences that make up one row `[members, T]`, for losses that compare them; 0: a row is `[T]`
    copies: int = 1  # rows that each sequence becomes, next to each other
    check: CheckCounts = lambda counts, source: None  # of all records of a source, which it names in a UserError

    @property
    def per_token(self) -> frozenset[str]:
        """The names of the arrays `[..., T]` that have one value per token."""
        return frozenset(name for name, spec in self.arrays.items() if spec.per_token)

    def packs(self, config: DataConfig) -> bool:
        """Whether rows of this config hold several sequences."""
        return config.packing and self.packable

    def shapes(self, config: DataConfig) -> dict[str, tuple[Shape, np.dtype]]:
        """`{name: (shape of one row, dtype)}` of a batch's arrays."""
        members = (self.members,) if self.members else ()
        shapes = {
            name: ((*members, config.seq_len) if spec.per_token else members, np.dtype(spec.dtype))
            for name, spec in self.arrays.items()
        }
        return {**shapes, "valid": ((), np.dtype("int32"))}
