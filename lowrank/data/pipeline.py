"""From a `DataConfig` to batches: read, render, encode, shuffle, pack, batch.

Every host computes the same global batches, and its devices receive the parts that they hold. So the order is the same
for any number of hosts, and a state that one number of hosts has saved continues on another.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import (
    FlatMapIterDataset,
    FlatMapTransform,
    ThreadPrefetchIterDataset,
    ZipIterDataset,
)

from lowrank.core.errors import UserError, plural
from lowrank.core.files import to_json
from lowrank.core.typing import HostArrays, Tokenizer
from lowrank.data import mixture, packing
from lowrank.data.config import DataConfig
from lowrank.data.examples import Examples, count_tokens
from lowrank.data.language import LANGUAGE
from lowrank.data.loader import Loader, check_length
from lowrank.data.row_format import EncodedSequence, RowFormat
from lowrank.data.transforms import TRANSFORMS


@dataclasses.dataclass(frozen=True)
class _Sequences(FlatMapTransform):
    examples: Examples

    def flat_map(self, place: tuple[int, int]) -> list[EncodedSequence]:
        epoch, index = place
        return self.examples.sequences(index, epoch)


@dataclasses.dataclass(frozen=True)
class _Copies(FlatMapTransform):
    count: int

    def flat_map(self, row: HostArrays) -> list[HostArrays]:
        return [row] * self.count


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    max_positions: int | None = None,
    row_format: RowFormat = LANGUAGE,
) -> Loader:
    """The loader of `config`, with rows as `row_format` says (an objective's `row_format`).

    Every record's answer is checked here, and up to `KEPT` records are encoded. Raises UserError for data that cannot
    be read or do not fit: `seq_len` beyond `max_positions` (the model's), an unknown dataset, split, template or field,
    a record without a field or with an empty completion, no records.
    """
    if max_positions is not None:
        check_length(config, max_positions)
    examples = Examples(config, row_format, tokenizer)
    batches = _batches(config, row_format, examples, tokenizer.pad_id)
    if config.prefetch:
        batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)
    shapes = {name: ((config.batch_size, *shape), dtype) for name, (shape, dtype) in row_format.shapes(config).items()}
    return Loader(batches, examples, shapes, _identity(config, row_format, examples))


def _batches(config: DataConfig, row_format: RowFormat, examples: Examples, pad_id: int) -> grain.IterDataset:
    """Batches of all records, or in turn of those that are not held out and of those that are, and then of all.

    A batch of all records is made beside each of the others, so that the position of one stream is that of both.
    """

    def stream(indices: Sequence[int]) -> grain.IterDataset:
        rows = _rows(config, row_format, examples, indices, pad_id)
        return packing.batch(rows, row_format.arrays, config.batch_size)

    everything = stream(range(len(examples)))
    if not config.holdout or config.holdout_batches == 0:
        return everything
    mixed = grain.IterDataset.mix([stream(order) for order in _held_apart(config, len(examples))])
    if config.holdout_batches is None:
        return mixed
    both = ZipIterDataset([mixed, everything], strict=False)
    return both.map_with_index(lambda i, pair: pair[i >= config.holdout_batches])


def _held_apart(config: DataConfig, size: int) -> list[list[int]]:
    """The records that are not held out, and those that are."""
    held = round(config.holdout * size)
    if not 0 < held < size:
        raise UserError(
            f"data.holdout={config.holdout} cuts {plural(size, 'record')} into {size - held} and {held}: "
            "each part needs records"
        )
    apart = np.arange(held) * size // held  # spread evenly: records are often in the order of their classes
    return [part.tolist() for part in (np.setdiff1d(np.arange(size), apart), apart)]


def _rows(
    config: DataConfig, row_format: RowFormat, examples: Examples, indices: Sequence[int], pad_id: int
) -> grain.IterDataset:
    sequences = _sequences(config, examples, indices)
    if row_format.packs(config):
        return packing.pack(sequences, row_format.arrays, config.seq_len, config.batch_size, pad_id)
    pad = functools.partial(packing.pad, arrays=row_format.arrays, length=config.seq_len, pad_id=pad_id)
    rows = sequences.map(pad)
    return rows if row_format.copies == 1 else FlatMapIterDataset(rows, _Copies(row_format.copies))


def _sequences(config: DataConfig, examples: Examples, indices: Sequence[int]) -> grain.IterDataset:
    """The sequences of these records in the order in which they are read; those of a mixture by its weights."""
    if not examples.weights:
        return _ordered(config, examples, indices, config.seed)
    shares = [_within(indices, part) for part in examples.ranges]
    shares = [(k, share) for k, share in enumerate(shares) if share]
    streams = [_ordered(config, examples, share, (config.seed + k) % 2**32) for k, share in shares]
    return mixture.mix_by_tokens(streams, [examples.weights[k] for k, _ in shares], count_tokens)


def _within(indices: Sequence[int], part: range) -> Sequence[int]:
    """Those of the sorted indices that are in the part; of a range without a list of them."""
    return indices[bisect.bisect_left(indices, part.start) : bisect.bisect_left(indices, part.stop)]


def _ordered(config: DataConfig, examples: Examples, indices: Sequence[int], seed: int) -> grain.IterDataset:
    order = grain.MapDataset.source(indices)
    if config.shuffle:
        order = order.shuffle(seed)  # in another order in each epoch
    order = order.repeat(config.epochs or None).map_with_index(lambda n, i: (n // len(indices), i))
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # one thread reads ahead, behind the batches
    return FlatMapIterDataset(order.to_iter_dataset(read), _Sequences(examples))


def _identity(config: DataConfig, row_format: RowFormat, examples: Examples) -> dict[str, Any]:
    """The settings that the order and content of the batches depend on, the tokenizer aside."""
    settings = {"objective": row_format.name} | dataclasses.asdict(config)
    unused = () if config.holdout else ("holdout", "holdout_batches")
    unused += ("too_long",) if config.too_long == "cut" else ()
    unused += tuple(name for name in TRANSFORMS if getattr(config, name) is None)
    for free in ("data_dir", "prefetch", "source", "labels", *unused):
        settings.pop(free)
    settings |= {"weights": examples.weights} if examples.weights else {}
    settings |= {name: to_json(settings[name], name) for name in TRANSFORMS if name in settings}  # as JSON has it
    return settings | {"labels": list(examples.labels), "records": examples.source.identity}
