"""Data: records from TFDS or JSONL, templates, packing and batches."""

from lowrank.data.pipeline import DataConfig, Loader, examples, make_loader

__all__ = ["DataConfig", "Loader", "examples", "make_loader"]
