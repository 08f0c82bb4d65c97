"""Rows of answers that are labeled as desirable or not: `prompt`, `completion` and a boolean `label`.

Shapes: N tokens of one sequence.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lowrank.core.errors import UserError, nearest
from lowrank.core.typing import Tokenizer
from lowrank.data.config import DataConfig
from lowrank.data.conversations import is_turns
from lowrank.data.language import LANGUAGE, LanguageEncoder
from lowrank.data.pairs import answer_renderer
from lowrank.data.row_format import ArraySpec, EncodedSequence, RowFormat
from lowrank.data.sources import Source
from lowrank.data.templates import Record

CLASSES = ("desirable", "undesirable")


@dataclasses.dataclass(frozen=True)
class JudgedEncoder(LanguageEncoder):
    """Sequences for next-token prediction and `desirable` int32, 1 or 0; the answer weighs 1 and the prompt 0."""

    label_field: str = "label"

    def __call__(self, record: Record, where: str) -> tuple[list[EncodedSequence], bool]:
        """`([sequence], whether the prompt was shortened)`. Raises UserError naming `where`."""
        desirable = np.int32(self.label(record, where))
        sequences, cut = super().__call__(record, where)
        return [{**one, "desirable": desirable} for one in sequences if isinstance(one, dict)], cut

    def count(self, sequence: EncodedSequence) -> dict[str, int]:
        """As for language modeling, and the answers of each class."""
        assert isinstance(sequence, dict)
        desirable = int(sequence["desirable"])
        return super().count(sequence) | dict(zip(CLASSES, (desirable, 1 - desirable), strict=True))

    def check(self, record: Record, where: str) -> None:
        """Raises UserError for a record that lacks an answer or a label; nothing is encoded."""
        self.label(record, where)
        super().check(record, where)

    def label(self, record: Record, where: str) -> bool:
        """Whether the answer is desirable. Raises UserError for a label that is not a boolean."""
        if self.label_field not in record:
            raise UserError(f"{where}: the record has no field {self.label_field!r}{nearest(self.label_field, record)}")
        found = record[self.label_field]
        if not isinstance(found, bool):
            raise UserError(f"{where}: {self.label_field} must be true or false, not {found!r}")
        return found


def judged_encoder(config: DataConfig, tokenizer: Tokenizer, source: Source) -> JudgedEncoder:
    """The encoder of a config.

    Raises UserError for a template or fields that do not fit, and for batches of one row, in which no prompt could be
    matched with the answer to another.
    """
    if config.batch_size < 2:
        raise UserError(
            f"data.batch_size={config.batch_size}: each prompt is also read with the answer to another one of its "
            "batch, so set it to 2 or more"
        )
    if config.label_field not in source.fields:
        close, found = nearest(config.label_field, source.fields), ", ".join(sorted(source.fields))
        raise UserError(
            f"{source.name} holds no labeled answers: the field {config.label_field!r} is missing{close}; its fields: "
            f"{found}"
        )
    renderer = answer_renderer(config, tokenizer, source, is_turns(source[0].get("completion")))
    return JudgedEncoder(renderer, tokenizer, config.seq_len, 0.0, label_field=config.label_field)


def _check_classes(counts: Mapping[str, int], source: str) -> None:
    for name, other in zip(CLASSES, reversed(CLASSES), strict=True):
        if not counts.get(name):
            raise UserError(f"{source}: every answer is {other}: the loss compares {' and '.join(CLASSES)} ones")


JUDGED = RowFormat(
    name="kto",
    encoder=judged_encoder,
    arrays={**LANGUAGE.arrays, "desirable": ArraySpec("int32", per_token=False)},
    check=_check_classes,
)
