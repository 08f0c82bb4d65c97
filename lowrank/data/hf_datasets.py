"""Datasets of the Hugging Face library `datasets`: of the hub by name, or a folder that `save_to_disk` wrote."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.paths import PathLike, expand
from lowrank.data.arrow import record_at
from lowrank.data.concatenation import Concatenation
from lowrank.data.splits import parse_split
from lowrank.data.templates import Record
from lowrank.data.text_file import checksum


class HfDataset:
    """`NAME[:CONFIG][@REVISION]` of the hub, or the path of a folder that `Dataset.save_to_disk` wrote.

    A folder with one dataset is the split `train`. Class labels become their names; sounds and pictures stay bytes.
    Raises UserError without the library, and where it cannot load the dataset.
    """

    typed = False

    def __init__(self, spec: str, split: str, data_dir: PathLike) -> None:
        del data_dir  # the library has a cache of its own
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"hf:{spec} needs the package datasets: install it with pip install 'lowrank[datasets]'")
        loaded = _load(spec)
        self.name = f"hf:{spec} ({split})"
        parts = parse_split(f"hf:{spec}", split, {name: _Counted(found) for name, found in loaded.items()})
        self._parts, self._places = parts, Concatenation(part.end - part.begin for part in parts)
        self._tables = {part.split: loaded[part.split].with_format("arrow") for part in parts}
        self._names = {n: _class_names(f) for s in self._tables for n, f in loaded[s].features.items()}
        self.fields = tuple(dict.fromkeys(name for s in self._tables for name in loaded[s].column_names))
        self.identity = f"hf {split} " + " ".join(_identity(loaded[part.split]) for part in parts)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        split, i = self._at(index)
        record = record_at(self._tables[split][i], 0)
        return {name: _named(self._names[name], value) for name, value in record.items()}

    def where(self, index: int) -> str:
        """`NAME record NUMBER`, from 1 in its split."""
        return f"{self.name} record {self._at(index)[1] + 1}"

    def labels(self, field: str) -> tuple[str, ...]:
        """The names of a class label in the order of its ids, else the sorted values of the splits in use."""
        if self._names.get(field):
            return self._names[field]
        tables = [table for table in self._tables.values() if field in table.column_names]
        found = {value for table in tables for value in table.unique(field) if isinstance(value, str | int)}
        return tuple(str(x) for x in sorted(found, key=lambda x: (isinstance(x, str), x)))

    def _at(self, index: int) -> tuple[str, int]:
        """The split of a record, and its number there."""
        part, i = self._places.find(index)
        return self._parts[part].split, self._parts[part].begin + i


class _Counted:
    """A dataset as the parser of splits sees it."""

    def __init__(self, dataset: Any) -> None:
        self.num_examples = dataset.num_rows


def _load(spec: str) -> dict[str, Any]:
    """The datasets of each split."""
    import datasets

    folder = expand(spec)
    try:
        if os.path.isdir(folder):
            found = datasets.load_from_disk(folder)
        else:
            name, _, revision = spec.partition("@")
            name, _, config = name.partition(":")
            found = datasets.load_dataset(name, config or None, revision=revision or None)
    except Exception as e:  # network, permission, name, format: each has its own classes
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        advice = " (a folder of data files is named by their kind: jsonl:, csv: or parquet:)"
        raise UserError(f"cannot load hf:{spec}: {reason}{advice if os.path.isdir(folder) else ''}") from None
    return dict(found) if isinstance(found, dict) else {"train": found}


def _class_names(feature: Any) -> tuple[str, ...]:
    return tuple(getattr(feature, "names", None) or ())


def _named(names: tuple[str, ...], value: Any) -> Any:
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


def _identity(dataset: Any) -> str:
    """The checksums of the dataset's files."""
    sums = []
    for entry in dataset.cache_files:
        with Path(entry["filename"]).open("rb") as file:
            sums.append(f"{checksum(file):08x}")
    return f"{dataset.num_rows} {' '.join(sums)}"
