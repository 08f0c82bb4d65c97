"""Continued pre-training with a share of an old text beside the new one: what is learned, and what is forgotten."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import continued
from experiments.objectives import reference
from experiments.objectives.part import Numbers, Part, Size
from experiments.objectives.texts import articles
from experiments.protocol.measures import Heading
from experiments.protocol.model import Model
from lowrank.evaluation.infilling import document_scores

FOLDER = Path("runs/objectives/texts/reference")
LENGTH = 128
SHARES = (0.0, 0.05, 0.25, 0.5)


def source(share: float) -> Mapping[str, Any]:
    """The keys of a run whose tokens are of the old text by this share."""
    old = f"jsonl:{FOLDER}"
    return {"data.source": f"{1 - share:g} * {continued.NEW} + {share:g} * {old}" if share else continued.NEW}


def config(size: Size) -> ConfigDict:
    """The config of a run."""
    made = continued.get_config()
    made.steps, made.model.name = size.steps, size.model
    made.data.update(seq_len=LENGTH)
    made.optim.update(warmup=2, lr=2e-3)
    made.eval = {"max_examples": 0}
    made.checkpoint = {}
    return made


def measure(model: Model, size: Size) -> Numbers:
    """The perplexity of held-out documents of the new text and of the old one."""
    old = [record["text"] for _, record in zip(range(size.records), reference.documents("test"), strict=False)]
    texts = {"new": articles(size.records), "old": old}
    return {name: document_scores(model.base, of, length=LENGTH)["perplexity"] for name, of in texts.items()}


PART = Part(
    name="replay",
    question="Does a share of the old text keep what was known of it?",
    rows={f"share {share:g}": source(share) for share in SHARES},
    baseline="share 0",
    prepare=lambda size: reference.main(str(FOLDER)),
    config=config,
    measure=measure,
    headings={
        "new": Heading("perplexity of the new text", "min"),
        "old": Heading("perplexity of the old text", "min"),
    },
)
