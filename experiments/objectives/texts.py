"""What every part of the study measures: perplexity on text that no run trains on."""

from typing import Any

from experiments.merging import tasks
from experiments.protocol.model import Model
from lowrank.core.paths import expand
from lowrank.data.config import DATA_DIR
from lowrank.data.sources import open_source
from lowrank.objectives import causal_lm

LENGTH = 128


def articles(count: int) -> list[str]:
    """The first articles of the test split."""
    source = open_source("bbc_news", "test", expand(DATA_DIR))
    return [source[i]["text"] for i in range(count)]


def perplexity_elsewhere(model: Model, paragraphs: int) -> float:
    """The perplexity of the first paragraphs of Python's language reference."""
    return perplexity(model, paragraphs, source=f"jsonl:{tasks.REFERENCE}", split="test")


def perplexity(model: Model, records: int, **changes: Any) -> float:
    """The perplexity of the `text` of the first records, left to right; `changes` name the source and the split."""
    plain = {"template": "text", "completion": "", "packing": False, "seq_len": LENGTH, "too_long": "cut"}
    data = {**plain, "max_examples": records, "infill": None, "batch_size": 4, **changes}
    return model.evaluate(causal_lm(), **data)["perplexity"]
