"""The `data` group of a config: the records to read, and how they become batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.data import templates

DATA_DIR = "~/.cache/lowrank/tfds"
TOO_LONG = ("cut", "drop", "error")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The records to read, and how they become batches.

    source: `bbc_news`, `tfds:NAME[/CONFIG][:VERSION]`, `hf:NAME[:CONFIG][@REVISION]`, or files: `jsonl:`, `csv:`,
      `tsv:` or `parquet:` and the path of a file, of a folder of SPLIT.jsonl and so on, or a pattern with `*`. Several
      sources are joined by ` + `; with weights, `0.7 * SOURCE + 0.3 * SOURCE`, each has that share of the tokens.
    split: as in TFDS: `train`, `test[:100]`, `train[:90%]`.
    template, completion, truncate, chat: see `templates.resolve`; `truncate` names the field that is cut when a record
      is longer than `seq_len` (the article: the answer is never cut).
    label_field, labels: for objectives with labels; `labels` fixes the names and their order (default: the source's).
    seq_len: tokens per row. batch_size: rows of all hosts together.
    packing: several sequences per row, for objectives whose rows allow it.
    too_long: what a record becomes that is longer than `seq_len`: `cut` (the long text is shortened; a conversation
      loses its oldest turns first; a record that is too long all the same is an error, or is left out and reported
      where there are too many records to look at all of them first), `drop` (it is left out) or `error`.
    prompt_loss_weight: the weight of a prompt's tokens in the loss, 0 to 1; an answer's tokens weigh 1. A weight of 0.1
      regularizes short answers (Huerta-Enochian & Ko, arXiv:2401.13586).
    infill, denoise: the groups of `infill.InfillConfig`, the middle of documents is moved to their end, and of
      `denoise.DenoiseConfig`, spans of documents are lost and follow them. Evaluation reads them from left to right.
    epochs: passes over the data; 0 or None never ends. max_examples: only this many records of each source; 0 or None
      takes all.
    holdout: the share of the records that batches 1, 3, ... (from 0) are drawn from, and no others; the rest of the
      records are in batches 0, 2, ... With 0 every batch is drawn from all records.
    holdout_batches: so many batches are drawn so, and those after them from all records; None: every batch.
    prefetch: batches that a thread makes ahead; 0 makes each batch when it is asked for.
    """

    source: str = "bbc_news"
    split: str = "train"
    template: str = templates.AUTO
    completion: str = ""
    truncate: str = ""
    chat: bool = False
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    seq_len: int = 256
    batch_size: int = 8
    too_long: str = "cut"
    packing: bool = True
    prompt_loss_weight: float = 0.1
    infill: Mapping[str, Any] | None = None
    denoise: Mapping[str, Any] | None = None
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    max_examples: int | None = None
    holdout: float = 0.0
    holdout_batches: int | None = None
    prefetch: int = 2
    data_dir: str = DATA_DIR

    def __post_init__(self) -> None:
        none = ("epochs", "max_examples", "holdout_batches", "prefetch")  # 0 is allowed
        for name, least in {"seq_len": 2, "batch_size": 1, **dict.fromkeys(none, 0)}.items():
            if (found := getattr(self, name)) is not None and found < least:
                raise UserError(f"data.{name}={found} is below {least}")
        if self.too_long not in TOO_LONG:
            raise unknown("data.too_long", self.too_long, TOO_LONG)
        if not 0 <= self.prompt_loss_weight <= 1:
            raise UserError(f"data.prompt_loss_weight={self.prompt_loss_weight} is not in [0, 1]")
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout={self.holdout} is not in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"data.seed={self.seed} is not in [0, 2**32)")
