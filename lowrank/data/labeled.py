"""Rows for classification: the tokens of a text, and the index of its label.

Shapes: N tokens of one sequence.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from lowrank.core.errors import UserError, nearest
from lowrank.core.typing import Tokenizer
from lowrank.data import templates
from lowrank.data.config import DataConfig
from lowrank.data.encode import Ids, fit
from lowrank.data.render import Renderer, build_renderer
from lowrank.data.row_format import INDEX, TOKENS, ArraySpec, EncodedSequence, RowFormat
from lowrank.data.sources import Source
from lowrank.data.templates import Record


@dataclasses.dataclass(frozen=True)
class LabeledEncoder:
    """Sequences for classification: `tokens` int32 `[N]` with the tokenizer's special tokens, and `labels` int32."""

    renderer: Renderer
    tokenizer: Tokenizer
    length: int
    label_field: str
    labels: tuple[str, ...]
    document = False

    def __call__(self, record: Record, where: str) -> tuple[list[EncodedSequence], bool]:
        """`([sequence], whether the text was shortened)`. Raises UserError naming `where`."""

        def build(long: str | None) -> Ids:
            ids = self.tokenizer.encode_special(self.text(record, where, long))
            return ids, [False] * len(ids)

        text = functools.partial(self.renderer.long_text, record, where)
        (ids, _), cut = fit(build, self.tokenizer, text, self.length, where)
        return [{"tokens": np.asarray(ids, np.int32), "labels": np.int32(self.label(record, where))}], cut is not None

    def count(self, sequence: EncodedSequence) -> dict[str, int]:
        """Nothing: no token is learned."""
        del sequence
        return {}

    def show(self, sequence: EncodedSequence) -> str:
        """The text of a sequence and its label."""
        assert isinstance(sequence, dict)
        text = self.tokenizer.decode(sequence["tokens"].tolist(), special=True)
        return f"{text} -> {self.labels[int(sequence['labels'])]}"

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks a field or a known label; nothing is encoded."""
        self.renderer.answer(record, where)
        self.label(record, where)

    def example(self, record: Record, where: str, reserve: int) -> dict[str, Any]:
        """The `text` of the record and its `label`, the index of its class. No text is generated: `reserve` is 0."""
        del reserve
        return {"text": self.text(record, where), "label": self.label(record, where)}

    def text(self, record: Record, where: str, long: str | None = None) -> str:
        """The text to classify."""
        return "".join(text for text, _ in self.renderer.pieces(record, where, long))

    def label(self, record: Record, where: str) -> int:
        """The index of the record's label in `labels`. Raises UserError for a label that is not among them."""
        if self.label_field not in record:
            raise UserError(f"{where}: the record has no field {self.label_field!r}{nearest(self.label_field, record)}")
        name = str(record[self.label_field])
        if name not in self.labels:
            known = ", ".join(self.labels)
            raise UserError(f"{where}: unknown label {name!r}{nearest(name, self.labels)}; known: {known}")
        return self.labels.index(name)


def labeled_encoder(config: DataConfig, tokenizer: Tokenizer, source: Source) -> LabeledEncoder:
    """The encoder of a config. Raises UserError for a template that does not fit the source, or too few labels."""
    labels = tuple(map(str, config.labels)) or source.labels(config.label_field)
    if len(labels) < 2:
        raise UserError(
            f"{source.name}: field {config.label_field!r} holds no labels to tell apart, only {list(labels)}: "
            "set data.label_field to a field with two labels or more"
        )
    name = "text" if config.template == templates.AUTO else config.template
    renderer = build_renderer(config, name, tokenizer, source)
    return LabeledEncoder(renderer, tokenizer, config.seq_len, config.label_field, labels)


LABELED = RowFormat(
    name="classification",
    encoder=labeled_encoder,
    arrays={"tokens": TOKENS, "segments": INDEX, "labels": ArraySpec("int32", per_token=False, filler=-1)},
)
