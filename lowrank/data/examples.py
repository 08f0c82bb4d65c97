"""The records of a config, encoded: checked, counted, and kept in memory if there are few."""

import collections
import functools
from typing import Any

from tqdm import tqdm

from lowrank.core.errors import TooLong, UserError
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data.config import DataConfig
from lowrank.data.language import LANGUAGE
from lowrank.data.row_format import EncodedSequence, RowFormat
from lowrank.data.sources import open_source

KEPT = 20_000  # a dataset of at most this many examples is encoded at the start, checked and kept in memory;
MEASURED = 2_000  # of a larger one, this many are counted


class Examples:
    """The encoded records of a config. `sequences(i)` are those of record `i`, kept in memory if there are few.

    A record that is left out, as `data.too_long` says, has no sequences.
    """

    def __init__(self, config: DataConfig, row_format: RowFormat, tokenizer: Tokenizer) -> None:
        """Reads the source and checks every record. Raises UserError naming a record that cannot be used."""
        self.source = open_source(config.source, config.split, config.data_dir)
        self.encoder = row_format.encoder(config, tokenizer, self.source)
        self.size = min(len(self.source), config.max_examples or len(self.source))
        self.dropped: dict[int, str] = {}  # the records that were left out so far, and why
        self._too_long, self._streams = config.too_long, self.size > KEPT
        self._kept: list[_Encoded] = []
        progress = functools.partial(tqdm, range(self.size), delay=5, leave=False, disable=None)
        if not self._streams:
            self._kept = [self._encode(i) for i in progress(f"encoding {self.source.name}")]
        elif config.too_long == "error" or not (self.source.typed and self.encoder.document):
            look = self._encode if config.too_long == "error" else self._check  # else no field can be missing
            for i in progress(f"checking {self.source.name}"):
                look(i)

    def __len__(self) -> int:
        return self.size

    def sequences(self, i: int) -> list[EncodedSequence]:
        """The sequences of record `i`. Raises UserError naming the record when it cannot be used."""
        return self._encoded(i)[0]

    def stats(self) -> dict[str, int]:
        """`examples`, and of the first `measured` ones: `sequences`, `tokens`, how many were `truncated` and `dropped`.

        The encoder adds counts of its own. Raises UserError if nothing is left, or if no end of an answer is learned.
        """
        encoded = self._kept or [self._encoded(i) for i in range(MEASURED)]
        members = [part for found, _ in encoded for sequence in found for part in _members(sequence)]
        counts = {
            "sequences": sum(len(found) for found, _ in encoded),
            "tokens": sum(len(m["tokens"]) for m in members),
        }
        counts |= {"truncated": sum(cut for _, cut in encoded), "dropped": sum(not found for found, _ in encoded)}
        if not members:
            raise UserError(f"{self.source.name}: every record is longer than data.seq_len: raise it")
        learned = sum((collections.Counter(self.encoder.count(m)) for m in members), collections.Counter())
        if self.encoder.count(members[0]) and not learned["ends"]:
            raise UserError(
                f"{self.source.name}: no token that ends a text is learned, so that generation would not end: "
                "the chat template must write one of the tokenizer's end tokens after an answer"
            )
        return {"examples": self.size, "measured": len(encoded), **counts, **learned}

    def preview(self) -> str:
        """The first record as it is learned."""
        first = next(found for i in range(self.size) if (found := self.sequences(i)))
        return "\n".join(self.encoder.show(member) for member in _members(first[0]))

    def _encoded(self, i: int) -> "_Encoded":
        return self._kept[i] if self._kept else self._encode(i)

    def _check(self, i: int) -> None:
        self.encoder.check(self.source[i], self.source.where(i))

    def _encode(self, i: int) -> "_Encoded":
        """The record, or no sequences for one that is left out. Raises UserError where it may be neither."""
        where = self.source.where(i)
        try:
            found, cut = self.encoder(self.source[i], where)
        except TooLong as e:
            if self._too_long == "drop" or (self._too_long == "cut" and self._streams):
                self.dropped[i] = str(e)
                return [], False
            raise
        if cut and self._too_long == "error":
            raise TooLong(f"{where}: longer than data.seq_len, and data.too_long=error: raise it, or set cut or drop")
        if cut and self._too_long == "drop":
            self.dropped[i] = f"{where}: longer than data.seq_len"
            return [], False
        return found, cut


_Encoded = tuple[list[EncodedSequence], bool]  # the sequences of a record, and whether it was shortened


def _members(sequence: EncodedSequence) -> tuple[HostArrays, ...]:
    return sequence if isinstance(sequence, tuple) else (sequence,)


def read_examples(
    config: DataConfig, tokenizer: Tokenizer, reserve: int = 0, row_format: RowFormat = LANGUAGE
) -> list[dict[str, Any]]:
    """The records for evaluation in order, each as the encoder's `example` gives it.

    For language modeling these are `prompt`, `completion` and `prompt_ids`, shortened so that `reserve` new tokens
    still fit into `seq_len`; for classification `text` and `label`. Raises UserError as `make_loader` does.
    """
    encoded = Examples(config, row_format, tokenizer)
    source, encoder = encoded.source, encoded.encoder
    return [encoder.example(source[i], source.where(i), reserve) for i in range(len(encoded))]
