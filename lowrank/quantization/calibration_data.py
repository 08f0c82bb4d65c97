"""Calibration data: the token ids that a model reads from some records.

Shapes: B rows, T tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from lowrank import data
from lowrank.core.errors import UserError, plural
from lowrank.data import mixture, templates
from lowrank.data.encode import fit
from lowrank.data.render import Plain
from lowrank.models import EncoderConfig

TokenRows = tuple[np.ndarray, np.ndarray]  # (tokens int32 [B, T], segments int32 [B, T])


def calibration_batches(text: data.DataConfig, tokenizer: Any, config: Any, rows: int) -> list[TokenRows]:
    """`[(tokens int32 [B, T], segments int32 [B, T])]` of at most `rows` rows, 0 is padding.

    A decoder reads packed rows, as in training; an encoder reads one record per row. Records are shuffled by
    `text.seed`. Raises UserError for data that cannot be read, and for less than one row of tokens.
    """
    if rows < 1:
        raise UserError(f"rows={rows} is below 1: calibration needs at least one row")
    length = min(text.seq_len, config.max_positions)
    text = dataclasses.replace(text, seq_len=length, batch_size=min(text.batch_size, rows), epochs=1, prefetch=0)
    read = _records if isinstance(config, EncoderConfig) else _packed
    batches = [
        (tokens, segments * (np.arange(first, first + len(tokens)) < rows)[:, None])
        for first, (tokens, segments) in zip(range(0, rows, text.batch_size), read(text, tokenizer), strict=False)
    ]
    count = sum(int((segments > 0).sum()) for _, segments in batches)
    if count < length:
        tokens = plural(count, "calibration token")
        raise UserError(f"{text.source} has only {tokens}, less than one row of {length}: name more data")
    return batches


def _packed(text: data.DataConfig, tokenizer: Any) -> Iterator[TokenRows]:
    for batch in data.make_loader(text, tokenizer):
        yield batch["tokens"], batch["segments"] * batch["valid"][:, None]


def _records(text: data.DataConfig, tokenizer: Any) -> Iterator[TokenRows]:
    source = mixture.join([part.source for part in mixture.open_parts(text.source, text.split, text.data_dir)])
    name = "text" if text.template == templates.AUTO else text.template
    template = templates.resolve(name, text.completion, text.truncate, False, source.fields, source.name)
    if template is None:
        raise UserError(f"template {name!r} is for conversations, which an encoder cannot read: name another template")
    order = np.random.default_rng(text.seed).permutation(len(source))
    for first in range(0, len(order), text.batch_size):
        tokens = np.full((text.batch_size, text.seq_len), tokenizer.pad_id, np.int32)
        segments = np.zeros_like(tokens)
        for row, i in enumerate(order[first : first + text.batch_size].tolist()):
            ids = _special(Plain(template), tokenizer, text.seq_len, source[i], source.where(i))
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        yield tokens, segments


def _special(renderer: Plain, tokenizer: Any, length: int, record: templates.Record, where: str) -> list[int]:
    """The ids of a record's text with the special tokens around it; the text is shortened to fit."""

    def build(long: str | None) -> tuple[list[int], list[bool]]:
        text = "".join(text for text, _ in renderer.pieces(record, where, long))
        return tokenizer.encode_special(text), []

    return fit(build, tokenizer, functools.partial(renderer.long_text, record, where), length, where)[0][0]
