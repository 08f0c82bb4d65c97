"""Datasets of TFDS without TensorFlow, among them the builder `bbc_news`."""

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lowrank.core import files
from lowrank.core.errors import UserError, nearest
from lowrank.core.paths import PathLike, as_local_path, expand
from lowrank.data import gfile, tfds_features
from lowrank.data.bbc_news import BbcNews
from lowrank.data.splits import bad_split
from lowrank.data.templates import Record

FORMAT = "array_record"  # the one TFDS format that is read without TensorFlow


class Tfds:
    """A TFDS dataset: `NAME`, `NAME/CONFIG`, `NAME:VERSION`, or the folder of one prepared as array_record.

    Nested features get dotted names (`answers.text`), class labels become their names.
    """

    typed = True

    def __init__(self, spec: str, split: str, data_dir: PathLike) -> None:
        builder = prepared(spec, as_local_path(data_dir))
        splits = builder.info.splits
        try:
            size = _size(splits, split)
        except (ValueError, NotImplementedError) as e:
            raise bad_split(spec, split, splits, e) from None
        try:
            self._records = builder.as_data_source(split) if size else []  # TFDS cannot open an empty one
        except NotImplementedError as e:
            raise UserError(
                f"{spec} in {builder.data_path} is not in the format {FORMAT}: prepare it with file_format={FORMAT!r}"
            ) from e
        self.name = f"tfds:{spec} ({split})"
        self.identity = f"tfds {builder.info.full_name} {split} {len(self._records)}"
        self._names = {
            name: tuple(feature.names) if isinstance(feature, tfds.features.ClassLabel) and feature.names else ()
            for name, feature in _flat(dict(builder.info.features)).items()
        }
        self.fields = tuple(self._names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = _flat(self._records[index])
        return {name: self._value(self._names.get(name, ()), value) for name, value in record.items()}

    def where(self, index: int) -> str:
        """`NAME record INDEX`."""
        return f"{self.name} record {index}"

    def labels(self, field: str) -> tuple[str, ...]:
        """The names of a class label, in the order of its ids."""
        return self._names.get(field, ())

    def _value(self, names: tuple[str, ...], value: Any) -> Any:
        if isinstance(value, np.ndarray | list):
            return [self._value(names, item) for item in value]
        if isinstance(value, bytes):
            return value.decode("utf-8", errors="replace")
        if isinstance(value, np.generic):
            value = value.item()
        return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


def _flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted names. TFDS writes a sequence of dicts as a dict of sequences."""
    flat = {}
    for name, value in nested.items():
        inner = getattr(value, "feature", value)
        inner = dict(inner) if hasattr(inner, "items") else value
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": value}
    return flat


def _size(splits: Any, split: str) -> int:
    """The number of examples that a split expression covers."""
    parts = tfds.core.splits.AbstractSplit.from_spec(split).to_absolute(splits)
    return sum(len(range(splits[p.splitname].num_examples)[p.from_ : p.to]) for p in parts)


def builders() -> list[str]:
    """The names of the datasets of TFDS."""
    return tfds.list_builders(with_community_datasets=False)


def prepared(spec: str, data_dir: Path, **kwargs: Any) -> tfds.core.DatasetBuilder:
    """The builder of `spec` with its data under `data_dir`; missing data are prepared there.

    The data are written beside and renamed as a whole, so that an interrupted run leaves nothing behind, and of two
    processes that prepare at the same time the first one wins. Raises UserError for an unknown name, and for data that
    cannot be prepared.
    """
    gfile.stand_in()
    if os.path.isdir(expand(spec)):
        return _prepared_folder(expand(spec))
    tfds_features.check_features(data_dir / re.split("[:/]", spec)[0])
    builder = _builder(spec, data_dir, **kwargs)
    if builder.data_path.exists():
        return builder
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with files.scratch_beside(data_dir / f"preparing-{builder.name}", folder=True) as beside:
            writer = _builder(spec, beside, **kwargs)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints lines; its progress bar stays
                writer.download_and_prepare(download_dir=str(data_dir / "downloads"), file_format=FORMAT)
            builder.data_path.parent.mkdir(parents=True, exist_ok=True)
            files.sync_folder(Path(writer.data_path))
            os.rename(writer.data_path, builder.data_path)
    except UserError:
        raise
    except Exception as e:
        if not builder.data_path.exists():  # else another process was faster
            raise UserError(f"cannot prepare {spec}: {type(e).__name__}: {_line(e)}") from e
    return _builder(spec, data_dir, **kwargs)


def _prepared_folder(folder: str) -> tfds.core.DatasetBuilder:
    """The builder of a dataset in a folder. Raises UserError if it holds none, or has features that are not TFDS's."""
    tfds_features.check_features(Path(folder))
    try:
        return tfds.builder_from_directory(folder)
    except Exception as e:  # TFDS has many kinds for a folder that is not one of its own
        raise UserError(f"{folder} is not the folder of a dataset that TFDS prepared: {_line(e)}") from None


def _builder(spec: str, data_dir: Path, **kwargs: Any) -> tfds.core.DatasetBuilder:
    if spec == "bbc_news":
        return BbcNews(data_dir=str(data_dir), file_format=FORMAT, **kwargs)
    try:
        return tfds.builder(spec, data_dir=str(data_dir), file_format=FORMAT, **kwargs)
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"unknown dataset 'tfds:{spec}'{nearest(spec, builders())}") from None
    except Exception as e:
        raise UserError(f"cannot open tfds:{spec}: {_line(e)}") from e


def _line(error: Exception) -> str:
    """The last line of an error's message: TFDS puts the reason after a preamble."""
    return (str(error).strip().splitlines() or [""])[-1].rsplit('}": ', 1)[-1][:300]
