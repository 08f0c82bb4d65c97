"""Where records come from: the table of the kinds of source, and the reading of a spec."""

from collections.abc import Callable
from typing import Protocol

from lowrank.core.errors import UserError, nearest
from lowrank.core.paths import PathLike
from lowrank.data.arrow import PARQUET
from lowrank.data.csv_files import CSV, TSV
from lowrank.data.file_source import FileSource, RecordFiles
from lowrank.data.hf_datasets import HfDataset
from lowrank.data.jsonl import JSONL
from lowrank.data.templates import Record
from lowrank.data.tfds_source import Tfds, builders


class Source(Protocol):
    """Records by index. `fields` are the names that occur; `identity` changes when the records do.

    Every record of a `typed` source has every field.
    """

    typed: bool
    name: str
    fields: tuple[str, ...]
    identity: str

    def __len__(self) -> int:
        """The number of records."""

    def __getitem__(self, index: int) -> Record:
        """One record: text, numbers and lists of them by field name."""

    def where(self, index: int) -> str:
        """The place of the record, for a reader: `news.jsonl:12`."""

    def labels(self, field: str) -> tuple[str, ...]:
        """The names that `field` takes, in the order of their ids; empty when it holds no labels."""


def _files(kind: RecordFiles) -> Callable[[str, str, PathLike], Source]:
    return lambda path, split, data_dir: FileSource(kind, path, split)


SOURCES: dict[str, Callable[[str, str, PathLike], Source]] = {  # (rest of the spec, split, data_dir) -> source
    **{kind.name: _files(kind) for kind in (JSONL, CSV, TSV, PARQUET)},
    "hf": HfDataset,
    "tfds": Tfds,
}
OWN = "bbc_news"  # a dataset of TFDS whose builder is this package's
KINDS = (OWN, "csv:PATH", "hf:NAME", "jsonl:PATH", "parquet:PATH", "tfds:NAME", "tsv:PATH")


def open_source(spec: str, split: str, data_dir: PathLike) -> Source:
    """The records of `spec`, one of `KINDS`; TFDS datasets are prepared under `data_dir` the first time.

    `split` is written as in TFDS: `train`, `test[:100]`, `train[10%:]`, `train+validation`. Raises UserError for an
    unknown dataset or split, and for one without records.
    """
    kind, _, rest = f"tfds:{OWN}".partition(":") if spec == OWN else spec.partition(":")
    if kind not in SOURCES or not rest:
        names = builders()
        close = f" (did you mean 'tfds:{spec}'?)" if spec in names else nearest(spec, [*KINDS, *names])
        raise UserError(f"unknown dataset {spec!r}{close}; known: {', '.join(KINDS)}")
    source = SOURCES[kind](rest, split, data_dir)
    if not len(source):
        raise UserError(f"{source.name} is empty: name a split with records")
    return source
