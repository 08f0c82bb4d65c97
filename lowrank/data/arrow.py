"""Records in Arrow tables, and the Parquet files that hold them."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lowrank.core.errors import UserError
from lowrank.data.file_source import RecordFiles
from lowrank.data.templates import Record
from lowrank.data.text_file import checksum


def record_at(table: pyarrow.Table, i: int) -> Record:
    """One row in Python's types.

    The objects inside a value lose their members that are null: Arrow gives each of them all the members that any of
    them has.
    """
    return {
        name: without_nulls(column[i].as_py()) for name, column in zip(table.column_names, table.columns, strict=True)
    }


def without_nulls(value: Any) -> Any:
    """The value, in which no object has a member that is null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class ParquetFile:
    """The records of a Parquet file, which is read into memory."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is not Parquet."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.checksum = checksum(file)
                file.seek(0)
                self._table = pyarrow.parquet.ParquetFile(file).read()
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{path} cannot be read as Parquet: {' '.join(str(e).split())}") from None
        self.fields, self.num_examples = tuple(self._table.column_names), self._table.num_rows
        if len(set(self.fields)) < len(self.fields):
            raise UserError(f"{path} has a field twice; its fields: {', '.join(self.fields)}")

    def read(self, i: int) -> Record:
        """One record."""
        return record_at(self._table, i)

    def where(self, i: int) -> str:
        """`PATH record NUMBER`, from 1."""
        return f"{self.path} record {i + 1}"


PARQUET = RecordFiles("parquet", ".parquet", ParquetFile)
