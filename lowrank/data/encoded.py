"""The encoded records of a config: checked, counted, and kept if there are few."""

import functools
from typing import Any

from tqdm import tqdm

from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.data import templates
from lowrank.data.config import DataConfig
from lowrank.data.encode import Labelled, Language
from lowrank.data.render import Chat, Plain
from lowrank.data.sources import Source, open_source

KEPT = 20_000  # a dataset of up to so many examples is encoded at the start, checked and kept in memory;
MEASURED = 2_000  # of a larger one, so many are


class Examples:
    """The encoded records of a config. `sequences(i)` are those of record `i`, kept once computed if there are few."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.source = open_source(config.source, config.split, config.data_dir)
        self.labels = _labels(config, self.source) if config.objective == "classification" else ()
        self.encode = _encoder(config, tokenizer, self.source, self.labels)
        self.size = min(len(self.source), config.max_examples or len(self.source))
        self._kept: list[tuple[list[HostArrays], bool]] = []
        every = functools.partial(tqdm, range(self.size), delay=5, leave=False, disable=None)
        if self.size <= KEPT:
            self._kept = [self._encoded(i) for i in every(f"encoding {self.source.name}")]
        elif not (self.source.typed and self.encode.document):  # else nothing can be missing
            for i in every(f"checking {self.source.name}"):
                self.encode.check(self.source[i], self.source.where(i))

    def __len__(self) -> int:
        return self.size

    def sequences(self, i: int) -> list[HostArrays]:
        """The sequences of record `i`. Raises UserError naming the record when it cannot be used."""
        return self._encoded(i)[0]

    def stats(self) -> dict[str, int]:
        """`examples`, and of the first `measured` ones: `sequences`, `tokens`, and how many were `truncated`."""
        found = self._kept or [self._encoded(i) for i in range(MEASURED)]
        lengths = [len(sequence["tokens"]) for sequences, _ in found for sequence in sequences]
        truncated = sum(cut for _, cut in found)
        counts = {"sequences": len(lengths), "tokens": sum(lengths), "truncated": truncated}
        return {"examples": self.size, "measured": len(found), **counts}

    def _encoded(self, i: int) -> tuple[list[HostArrays], bool]:
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
