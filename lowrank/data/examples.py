"""The records of a config, encoded: checked, counted, and kept in memory if there are few."""

import collections
import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
from tqdm import tqdm

from lowrank.core.errors import TooLong, UserError
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data import mixture
from lowrank.data.concatenation import Concatenation
from lowrank.data.config import DataConfig
from lowrank.data.language import LANGUAGE
from lowrank.data.row_format import RECORD, EncodedSequence, Encoder, RowFormat
from lowrank.data.sources import Source
from lowrank.data.templates import Record
from lowrank.data.transforms import NONE, build_transform, name_of

LONGEST = 2**30  # tokens of a record that is read whole
KEPT = 20_000  # a dataset of at most this many examples is encoded at the start, checked and kept in memory;
MEASURED = 2_000  # of a larger one, this many are counted


class Examples:
    """The encoded records of a config. `sequences(i)` are those of record `i`, kept in memory if there are few.

    The records of several sources follow one another: `ranges` are those of each, and `weights` the sources' weights,
    if they have some. A record that is left out, as `data.too_long` says, has no sequences.
    """

    def __init__(self, config: DataConfig, row_format: RowFormat, tokenizer: Tokenizer) -> None:
        """Reads the sources and checks every record. Raises UserError naming a record that cannot be used."""
        self._transform, self._seed = build_transform(config, tokenizer), config.seed
        parts = mixture.open_parts(config.source, config.split, config.data_dir)
        self.source = mixture.join([part.source for part in parts])
        self.weights = [part.weight for part in parts if part.weight is not None]
        self._sources = mixture.members(self.source)
        self.encoders = [row_format.encoder(config, tokenizer, source) for source in self._sources]
        if self._transform and not (row_format is LANGUAGE and all(encoder.document for encoder in self.encoders)):
            raise UserError(
                f"data.{name_of(config)} changes documents: leave it out, or set a data.template of one text"
            )
        sizes = [min(len(source), config.max_examples or len(source)) for source in self._sources]
        self.ranges = [range(end - size, end) for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
        self._places = Concatenation(sizes)
        self.size = len(self._places)
        self.dropped: dict[int, str] = {}  # the records that were left out so far, and why
        self._check_counts, self._numbered = row_format.check, RECORD in row_format.arrays
        self._too_long, self._streams = config.too_long, self.size > KEPT
        self._kept: list[_Encoded] = []
        progress = functools.partial(tqdm, delay=5, leave=False, disable=None)
        if not self._streams:
            self._kept = [self._encode(i) for i in progress(range(self.size), f"encoding {self.source.name}")]
            return
        for part, source, encoder in zip(self.ranges, self._sources, self.encoders, strict=True):
            if config.too_long == "error" or not (source.typed and encoder.document):  # else no field can be missing
                look = self._encode if config.too_long == "error" else self._check
                for i in progress(part, f"checking {source.name}"):
                    look(i)

    def __len__(self) -> int:
        return self.size

    def sequences(self, i: int, epoch: int = 0) -> list[EncodedSequence]:
        """The sequences of record `i` in an epoch. Raises UserError naming the record when it cannot be used."""
        found = self._encoded(i)[0]
        if self._transform:
            found = [self._transform(dict(s), (self._seed, epoch, i, k)) for k, s in enumerate(map(_only, found))]
        return [_numbered(sequence, i) for sequence in found] if self._numbered else found

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes in order; empty without classes."""
        return self.encoders[0].labels

    def record(self, i: int) -> tuple[Record, str]:
        """The record `i` as it is, and its place for a reader."""
        source, _, local = self._at(i)
        return source[local], source.where(local)

    def example(self, i: int, reserve: int) -> dict[str, Any]:
        """The record `i` for evaluation, shortened so that `reserve` new tokens fit into a row."""
        source, encoder, local = self._at(i)
        return encoder.example(source[local], source.where(local), reserve)

    def stats(self) -> dict[str, int]:
        """`examples`, and of `measured` ones: `sequences`, `tokens`, how many were `truncated` and `dropped`.

        The encoder adds counts of its own. Raises UserError if nothing is left, or if no end of an answer is learned.
        """
        encoded = self._kept or [self._encoded(i) for i in self._measured()]
        members = [part for found, _ in encoded for sequence in found for part in members_of(sequence)]
        counts = {
            "sequences": sum(len(found) for found, _ in encoded),
            "tokens": sum(len(m["tokens"]) for m in members),
        }
        counts |= {"truncated": sum(cut for _, cut in encoded), "dropped": sum(not found for found, _ in encoded)}
        if not members:
            raise UserError(f"{self.source.name}: every record is longer than data.seq_len: raise it")
        encoder = self.encoders[0]  # all of one row format, which counts alike
        learned = sum((collections.Counter(encoder.count(m)) for m in members), collections.Counter())
        if encoder.count(members[0]) and not learned["ends"]:
            raise UserError(
                f"{self.source.name}: no token that ends a text is learned, so that generation would not end: "
                "the chat template must write one of the tokenizer's end tokens after an answer"
            )
        if len(encoded) == self.size:
            self._check_counts(learned, self.source.name)
        return {"examples": self.size, "measured": len(encoded), **counts, **learned}

    def preview(self) -> str:
        """The first record of each source as it is learned."""
        shown = []
        for part, encoder in zip(self.ranges, self.encoders, strict=True):
            first = next((found for i in part if (found := self.sequences(i))), [])
            shown += [encoder.show(member) for sequence in first[:1] for member in members_of(sequence)]
        return "\n".join(shown)

    def shares(self) -> list[str]:
        """One line for each of several sources: its share of a mixture's tokens, its records and its tokens."""
        if len(self.ranges) == 1:
            return []
        lines, total = [], sum(self.weights)
        for k, (part, source) in enumerate(zip(self.ranges, self._sources, strict=True)):
            looked = [i for i in self._measured() if i in part]
            tokens = sum(count_tokens(found) for i in looked for found in self.sequences(i)) / max(1, len(looked))
            share = f"{self.weights[k] / total:.1%} of the tokens, " if self.weights else ""
            lines.append(f"  {source.name}: {share}{len(part):,} examples of about {tokens:,.0f} tokens")
        return lines

    def _measured(self) -> range:
        """The records that are counted: the first ones, or of several sources some of each."""
        few = min(MEASURED, self.size)
        return range(few) if len(self.ranges) == 1 else range(0, self.size, self.size // few)

    def _at(self, i: int) -> tuple[Source, Encoder, int]:
        """`(source, encoder, number in the source)` of record `i`."""
        k, local = self._places.find(i)
        return self._sources[k], self.encoders[k], local

    def _encoded(self, i: int) -> "_Encoded":
        return self._kept[i] if self._kept else self._encode(i)

    def _check(self, i: int) -> None:
        source, encoder, local = self._at(i)
        encoder.check(source[local], source.where(local))

    def _encode(self, i: int) -> "_Encoded":
        """The record, or no sequences for one that is left out. Raises UserError where it may be neither."""
        source, encoder, local = self._at(i)
        where = source.where(local)
        try:
            found, cut = encoder(source[local], where)
        except TooLong as e:
            if self._too_long == "drop" or (self._too_long == "cut" and self._streams):
                self.dropped[i] = str(e)
                return [], False
            raise
        for sequence in found if self._transform else ():
            self._transform.check(_only(sequence), where)
        if cut and self._too_long == "error":
            raise TooLong(f"{where}: longer than data.seq_len, and data.too_long=error: raise it, or set cut or drop")
        if cut and self._too_long == "drop":
            self.dropped[i] = f"{where}: longer than data.seq_len"
            return [], False
        return found, cut


_Encoded = tuple[list[EncodedSequence], bool]  # the sequences of a record, and whether it was shortened


def members_of(sequence: EncodedSequence) -> tuple[HostArrays, ...]:
    """The sequences that make up one row."""
    return sequence if isinstance(sequence, tuple) else (sequence,)


def _only(sequence: EncodedSequence) -> HostArrays:
    """The one member of a row."""
    (member,) = members_of(sequence)
    return member


def _numbered(sequence: EncodedSequence, record: int) -> EncodedSequence:
    """A sequence, or the members of a row, with the number of the record."""
    numbered = tuple({**member, RECORD: np.int32(record)} for member in members_of(sequence))
    return numbered if isinstance(sequence, tuple) else numbered[0]


def count_tokens(sequence: EncodedSequence) -> int:
    """The tokens of all members of a row."""
    return sum(len(member["tokens"]) for member in members_of(sequence))


def read_examples(
    config: DataConfig, tokenizer: Tokenizer, reserve: int = 0, row_format: RowFormat = LANGUAGE
) -> list[dict[str, Any]]:
    """The records for evaluation in order, each as the encoder's `example` gives it.

    For language modeling these are `prompt`, `completion` and `prompt_ids`, shortened so that `reserve` new tokens
    still fit into `seq_len`; for classification `text` and `label`. Raises UserError as `make_loader` does.
    """
    encoded = Examples(config, row_format, tokenizer)
    return [encoded.example(i, reserve) for i in range(len(encoded))]


def read_documents(config: DataConfig, tokenizer: Tokenizer, tokens: int = 0) -> list[np.ndarray]:
    """The token ids int32 of each record of texts, whole, with the tokens that start and end it, in order.

    Of a record with an answer these are the prompt and the answer. At most `tokens` in all; 0: all. Raises UserError as
    `make_loader` does.
    """
    encoded = Examples(dataclasses.replace(config, seq_len=LONGEST, **NONE), LANGUAGE, tokenizer)
    found, left = list[np.ndarray](), tokens or LONGEST
    for i in range(len(encoded)):
        for sequence in map(_only, encoded.sequences(i)) if left > 0 else ():
            ids = np.concatenate([sequence["tokens"], sequence["targets"][-1:]])[:left]
            found.append(ids.astype(np.int32))
            left -= len(ids)
    return found
