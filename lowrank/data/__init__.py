"""Data: records from TFDS or JSONL, templates, packing and batches."""

from lowrank.data.config import DataConfig
from lowrank.data.encoded import examples
from lowrank.data.loader import Loader
from lowrank.data.pipeline import make_loader

__all__ = ["DataConfig", "Loader", "examples", "make_loader"]
