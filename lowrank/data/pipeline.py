"""From a `DataConfig` to batches: read, render, encode, shuffle, pack, batch, take this host's rows.

Every host computes the same global batches and keeps its own rows, so the order is the same for any number of hosts,
and a saved state restores onto another number of them.
"""

import dataclasses
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from grain.experimental import FlatMapIterDataset, FlatMapTransform, ThreadPrefetchIterDataset
from tqdm import tqdm

from lowrank.data import packing, templates
from lowrank.data.encode import Arrays, Labelled, Language
from lowrank.data.render import Chat, Plain
from lowrank.data.sources import Source, open_source
from lowrank.errors import UserError, unknown

OBJECTIVES = ("causal_lm", "classification")
KEPT = 20_000  # a dataset of up to so many examples is encoded at the start, checked and kept in memory;
MEASURED = 2_000  # of a larger one, so many are
DATA_DIR = "~/.cache/lowrank/tfds"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how to cut it into batches.

    source: `bbc_news`, `jsonl:PATH` (a file, or a folder of SPLIT.jsonl) or `tfds:NAME[/CONFIG][:VERSION]`.
    split: as in TFDS: `train`, `test[:100]`, `train[:90%]`.
    template, completion, truncate, chat: see `templates.resolve`; `truncate` names the field that is cut when a record
      is longer than `seq_len` (the article: the answer is never cut).
    label_field, labels: for classification; `labels` fixes the names and their order (default: those of the source).
    seq_len: tokens a row. batch_size: rows of all hosts together.
    packing: several sequences to a row, for causal_lm.
    prompt_loss_weight: weight of a prompt's tokens in the loss, 0 to 1; the answer's is 1. 0.1 regularises short
      answers (Huerta-Enochian & Ko, arXiv:2401.13586).
    epochs: passes over the data; 0 or None never ends. max_examples: only the first so many; 0 or None takes all.
    holdout: the share of the records that batches 1, 3, ... (from 0) are of, and only they; the others are in batches
      0, 2, ... 0: every batch is of all records.
    prefetch: batches made ahead by a thread; 0 makes them when asked.
    """

    source: str = "bbc_news"
    split: str = "train"
    objective: str = "causal_lm"
    template: str = templates.AUTO
    completion: str = ""
    truncate: str = ""
    chat: bool = False
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    seq_len: int = 256
    batch_size: int = 8
    packing: bool = True
    prompt_loss_weight: float = 0.1
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    max_examples: int | None = None
    holdout: float = 0.0
    prefetch: int = 2
    data_dir: str = DATA_DIR

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        for name, least in (("seq_len", 2), ("batch_size", 1), ("epochs", 0), ("max_examples", 0), ("prefetch", 0)):
            if (found := getattr(self, name)) is not None and found < least:
                raise UserError(f"data.{name}={found} is below {least}")
        if not 0 <= self.prompt_loss_weight <= 1:
            raise UserError(f"data.prompt_loss_weight={self.prompt_loss_weight} is not in [0, 1]")
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout={self.holdout} is not in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"data.seed={self.seed} is not in [0, 2**32)")


class Examples:
    """The encoded records of a config. `sequences(i)` are those of record `i`, kept once computed if there are few."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.source = open_source(config.source, config.split, config.data_dir)
        self.labels = _labels(config, self.source) if config.objective == "classification" else ()
        self.encode = _encoder(config, tokenizer, self.source, self.labels)
        self.size = min(len(self.source), config.max_examples or len(self.source))
        self._kept: list[tuple[list[Arrays], bool]] = []
        every = functools.partial(tqdm, range(self.size), delay=5, leave=False, disable=None)
        if self.size <= KEPT:
            self._kept = [self._encoded(i) for i in every(f"encoding {self.source.name}")]
        elif not (self.source.typed and self.encode.document):  # else nothing can be missing
            for i in every(f"checking {self.source.name}"):
                self.encode.check(self.source[i], self.source.where(i))

    def __len__(self) -> int:
        return self.size

    def sequences(self, i: int) -> list[Arrays]:
        """The sequences of record `i`. Raises UserError naming the record when it cannot be used."""
        return self._encoded(i)[0]

    def stats(self) -> dict[str, int]:
        """`examples`, and of the first `measured` ones: `sequences`, `tokens`, and how many were `truncated`."""
        found = self._kept or [self._encoded(i) for i in range(MEASURED)]
        lengths = [len(sequence["tokens"]) for sequences, _ in found for sequence in sequences]
        truncated = sum(cut for _, cut in found)
        counts = {"sequences": len(lengths), "tokens": sum(lengths), "truncated": truncated}
        return {"examples": self.size, "measured": len(found), **counts}

    def _encoded(self, i: int) -> tuple[list[Arrays], bool]:
        return self._kept[i] if self._kept else self.encode(self.source[i], self.source.where(i))


def _labels(config: DataConfig, source: Source) -> tuple[str, ...]:
    labels = tuple(map(str, config.labels)) or source.labels(config.label_field)
    if len(labels) < 2:
        raise UserError(f"{source.name}: field {config.label_field!r} holds no labels to tell apart: {list(labels)}")
    return labels


def _encoder(config: DataConfig, tokenizer: Any, source: Source, labels: tuple[str, ...]) -> Language | Labelled:
    name = "text" if labels and config.template == templates.AUTO else config.template
    template = templates.resolve(name, config.completion, config.truncate, config.chat, source.fields, source.name)
    renderer = Plain(template) if template and not template.chat else Chat(tokenizer, template)
    if labels:
        return Labelled(renderer, tokenizer, config.seq_len, config.label_field, labels)
    return Language(renderer, tokenizer, config.seq_len, config.prompt_loss_weight)


@dataclasses.dataclass(frozen=True)
class _Sequences(FlatMapTransform):
    examples: Examples

    def flat_map(self, index: int) -> list[Arrays]:
        return self.examples.sequences(index)


class Loader:
    """Batches of this host, without end or for `epochs`, and a state that continues them exactly.

    `labels` are the class names in order, `stats` what was counted (`Examples.stats`). A batch has `tokens, segments`
    int32 `[B,T]`; for causal_lm also `targets, positions` int32 and `weights` float32 `[B,T]`, for classification
    `labels` int32 `[B]`; `valid` int32 `[B]` is 0 on rows that only fill up the last batch.
    """

    def __init__(self, batches: grain.IterDataset, examples: Examples, identity: dict[str, Any]) -> None:
        self._batches, self._identity = batches, identity
        self.labels, self.stats = examples.labels, examples.stats()
        self._start()

    def __iter__(self) -> Iterator[Arrays]:
        return self

    def __next__(self) -> Arrays:
        if not self._live:
            raise StopIteration
        return next(self._live[0])

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """`(shape, dtype)` of each array of a batch. The next batch stays the next."""
        start = self.get_state()
        first = next(self)
        self.set_state(start)
        return {name: (x.shape, x.dtype) for name, x in first.items()}

    def get_state(self) -> dict[str, Any]:
        """Where the next batch starts, for JSON."""
        return {"data": self._identity, "iterator": self._live[0].get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch before `get_state`. Raises UserError for a state of other data or settings."""
        for name, value in self._identity.items():
            if (saved := state["data"].get(name)) != value:
                raise UserError(f"the saved data state is of other data: data.{name} was {saved!r}, is {value!r}")
        self.close()
        self._start()
        self._live[0].set_state(state["iterator"])

    def close(self) -> None:
        """Stops the thread that makes batches ahead; there are no more."""
        self._stop()

    def _start(self) -> None:
        self._live = [iter(self._batches)]
        self._stop = weakref.finalize(self, _end, self._live)  # at exit too: threads must not outlive the modules


def _end(live: list[grain.DatasetIterator]) -> None:
    while live:
        live.pop().close()


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


def examples(config: DataConfig, tokenizer: Any, reserve: int = 0) -> list[dict[str, Any]]:
    """The records for evaluation, in order.

    causal_lm: `prompt` and `completion` (strings) and `prompt_ids`, the tokens to continue, with the start token
    and shortened so that `reserve` new tokens still fit into `seq_len`. classification: `text` and `label`, the
    index of its class.
    """
    found = Examples(config, tokenizer)
    make = functools.partial(_labelled, found) if found.labels else functools.partial(_prompted, found, reserve)
    return [make(found.source[i], found.source.where(i)) for i in range(len(found))]


def _labelled(found: Examples, record: templates.Record, where: str) -> dict[str, Any]:
    return {"text": found.encode.text(record, where), "label": found.encode.label(record, where)}


def _prompted(found: Examples, reserve: int, record: templates.Record, where: str) -> dict[str, Any]:
    text, ids = found.encode.prompt(record, where, reserve)
    return {"prompt": text, "prompt_ids": ids, "completion": found.encode.renderer.answer(record, where)}
