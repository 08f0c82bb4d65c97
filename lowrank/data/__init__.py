"""Data: records from files and datasets, mixtures, templates, packing and batches."""

from lowrank.data.config import DataConfig
from lowrank.data.examples import read_documents, read_examples
from lowrank.data.judged import JUDGED
from lowrank.data.labeled import LABELED
from lowrank.data.language import LANGUAGE
from lowrank.data.loader import Loader, PlannedLoader
from lowrank.data.pairs import PAIRS, SCORED_PAIRS
from lowrank.data.pipeline import make_loader
from lowrank.data.prompts import prompt_rows
from lowrank.data.row_format import ArraySpec, RowFormat

__all__ = [
    "JUDGED",
    "LABELED",
    "LANGUAGE",
    "PAIRS",
    "SCORED_PAIRS",
    "ArraySpec",
    "DataConfig",
    "Loader",
    "PlannedLoader",
    "RowFormat",
    "make_loader",
    "prompt_rows",
    "read_documents",
    "read_examples",
]
