"""From a `DataConfig` to batches: read, render, encode, shuffle, pack, batch, take this host's rows.

Every host computes the same global batches and keeps its own rows, so the order is the same for any number of hosts,
and a saved state restores onto another number of them.
"""

import dataclasses
import functools
from typing import Any

import grain
import numpy as np
from grain.experimental import FlatMapIterDataset, FlatMapTransform, ThreadPrefetchIterDataset

from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.data import packing
from lowrank.data.config import DataConfig
from lowrank.data.encoded import Examples
from lowrank.data.loader import Loader


@dataclasses.dataclass(frozen=True)
class _Sequences(FlatMapTransform):
    examples: Examples

    def flat_map(self, index: int) -> list[HostArrays]:
        return self.examples.sequences(index)


def make_loader(
    config: DataConfig,
    tokenizer: Any,
    process_index: int = 0,
    process_count: int = 1,
    max_positions: int | None = None,
) -> Loader:
    """The loader of `config` for this host. Every record's answer is checked now, and up to `KEPT` records are encoded.

    Raises UserError for what cannot be read or does not fit: `seq_len` beyond `max_positions` (the model's), a
    `batch_size` that the hosts cannot share, an unknown dataset, split, template or field, a record without a field or
    with an empty completion, no records at all.
    """
    if max_positions is not None and config.seq_len > max_positions:
        raise UserError(f"data.seq_len={config.seq_len} exceeds the model's {max_positions} positions")
    if config.batch_size % process_count:
        raise UserError(f"data.batch_size={config.batch_size} is not divisible by {process_count} hosts")
    found = Examples(config, tokenizer)
    rows = [_rows(config, found, order, tokenizer.pad_id) for order in _orders(config, found)]
    streams = [packing.batch(stream, config.batch_size) for stream in rows]
    batches = streams[0] if len(streams) == 1 else grain.IterDataset.mix(streams)  # in turn
    batches = batches.map(functools.partial(packing.rows_of, process_index=process_index, process_count=process_count))
    if config.prefetch:
        batches = ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)
    return Loader(batches, found, _identity(config, found))


def _orders(config: DataConfig, examples: Examples) -> list[grain.MapDataset]:
    """The records of each stream: all of them, or those that are not held out and those that are."""
    size, held = len(examples), round(config.holdout * len(examples))
    if not config.holdout:
        return [grain.MapDataset.range(size)]
    if not 0 < held < size:
        raise UserError(f"data.holdout={config.holdout} cuts {size} records into {size - held} and {held}: too few")
    apart = np.arange(held) * size // held  # spread evenly: records are often in the order of their classes
    return [grain.MapDataset.source(part.tolist()) for part in (np.setdiff1d(np.arange(size), apart), apart)]


def _rows(config: DataConfig, examples: Examples, order: grain.MapDataset, pad_id: int) -> grain.IterDataset:
    if config.shuffle:
        order = order.shuffle(config.seed)  # anew in each epoch
    order = order.repeat(config.epochs or None)
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the thread is behind the batches
    sequences = FlatMapIterDataset(order.to_iter_dataset(read), _Sequences(examples))
    if config.packing and not examples.labels:
        return packing.pack(sequences, config.seq_len, config.batch_size, pad_id)
    return sequences.map(functools.partial(packing.pad, length=config.seq_len, pad_id=pad_id))


def _identity(config: DataConfig, examples: Examples) -> dict[str, Any]:
    """What the order and content of the batches depend on, the tokenizer aside."""
    settings = dataclasses.asdict(config)
    for free in ("data_dir", "prefetch", "source", "labels", *(() if config.holdout else ("holdout",))):
        settings.pop(free)
    return settings | {"labels": list(examples.labels), "records": examples.source.identity}
