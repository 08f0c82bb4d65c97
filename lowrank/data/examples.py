"""The records of a config, encoded: checked, counted, and kept in memory if there are few."""

import functools
from typing import Any

from tqdm import tqdm

from lowrank.core.typing import Tokenizer
from lowrank.data.config import DataConfig
from lowrank.data.language import LANGUAGE
from lowrank.data.row_format import EncodedSequence, RowFormat
from lowrank.data.sources import open_source

KEPT = 20_000  # a dataset of at most this many examples is encoded at the start, checked and kept in memory;
MEASURED = 2_000  # of a larger one, this many are counted


class Examples:
    """The encoded records of a config. `sequences(i)` are those of record `i`, kept in memory if there are few."""

    def __init__(self, config: DataConfig, row_format: RowFormat, tokenizer: Tokenizer) -> None:
        """Reads the source and checks every record. Raises UserError naming a record that cannot be used."""
        self.source = open_source(config.source, config.split, config.data_dir)
        self.encoder = row_format.encoder(config, tokenizer, self.source)
        self.size = min(len(self.source), config.max_examples or len(self.source))
        self._kept: list[tuple[list[EncodedSequence], bool]] = []
        progress = functools.partial(tqdm, range(self.size), delay=5, leave=False, disable=None)
        if self.size <= KEPT:
            self._kept = [self._encoded(i) for i in progress(f"encoding {self.source.name}")]
        elif not (self.source.typed and self.encoder.document):  # else no field can be missing
            for i in progress(f"checking {self.source.name}"):
                self.encoder.check(self.source[i], self.source.where(i))

    def __len__(self) -> int:
        return self.size

    def sequences(self, i: int) -> list[EncodedSequence]:
        """The sequences of record `i`. Raises UserError naming the record when it cannot be used."""
        return self._encoded(i)[0]

    def stats(self) -> dict[str, int]:
        """`examples`, and of the first `measured` ones: `sequences`, `tokens`, and how many were `truncated`."""
        encoded = self._kept or [self._encoded(i) for i in range(MEASURED)]
        lengths = [_length(sequence) for sequences, _ in encoded for sequence in sequences]
        truncated = sum(cut for _, cut in encoded)
        counts = {"sequences": len(lengths), "tokens": sum(lengths), "truncated": truncated}
        return {"examples": self.size, "measured": len(encoded), **counts}

    def _encoded(self, i: int) -> tuple[list[EncodedSequence], bool]:
        return self._kept[i] if self._kept else self.encoder(self.source[i], self.source.where(i))


def _length(sequence: EncodedSequence) -> int:
    members = sequence if isinstance(sequence, tuple) else (sequence,)
    return sum(len(member["tokens"]) for member in members)


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
