"""Infilling learned from documents whose middle is moved: what it brings, and what it costs left to right."""

from ml_collections import ConfigDict

from configs import common
from experiments.merging import tasks
from experiments.objectives.part import Numbers, Part, Size
from experiments.objectives.texts import articles, perplexity_elsewhere
from experiments.protocol.measures import Heading
from experiments.protocol.model import Model
from lowrank.evaluation.infilling import document_scores, infill_scores

LENGTH = 128
SENTINELS = ("<repo_name>", "<file_sep>", "<filename>")  # which SmolLM2 has for code, and BBC news does not need
LORA = {"name": "lora", "rank": 8, "alpha": 16.0, "target": r".*/(q|k|v|o|gate|up|down)/kernel"}
RATES = (0.0, 0.5, 0.9)


def config(size: Size) -> ConfigDict:
    """The config of a run."""
    return common.new(
        seed=0,
        steps=size.steps,
        objective="causal_lm",
        model={"name": size.model, "remat": "dots"},
        method={**LORA, "also_tokens": SENTINELS},
        data={
            "source": "bbc_news",
            "split": "train",
            "template": "text",
            "seq_len": LENGTH,
            "batch_size": 4,
            "infill": {"rate": 0.5, "sentinels": SENTINELS},
        },
        optim={"name": "adamw", "lr": 1e-3, "schedule": "linear", "warmup": 2, "clip": 1.0},
        eval={"max_examples": 0},
        logits_chunk_tokens=256,
        log_every=4,
    )


def measure(model: Model, size: Size) -> Numbers:
    """The scores of gaps in test articles, and the perplexity of the articles and of other text, left to right."""
    documents = articles(size.records)
    found = infill_scores(model.base, documents, length=LENGTH, max_new=24, longest=48, sentinels=SENTINELS)
    return {
        "articles": document_scores(model.base, documents, length=LENGTH)["perplexity"],
        "middle": found["perplexity"],
        "left_to_right": found["left_to_right_perplexity"],
        "edit": found["edit_similarity"],
        "exact": found["exact_match"],
        "elsewhere": perplexity_elsewhere(model, size.records),
    }


PART = Part(
    name="infilling",
    question="Does infilling cost anything left to right?",
    rows={f"rate {rate:g}": {"data.infill.rate": rate} for rate in RATES},
    baseline="rate 0",
    prepare=lambda size: tasks.write_texts(),
    config=config,
    measure=measure,
    headings={
        "articles": Heading("perplexity of articles, left to right", "min"),
        "middle": Heading("perplexity of the middle", "min"),
        "left_to_right": Heading("the same tokens, left to right"),
        "edit": Heading("edit similarity of the middle", "max"),
        "exact": Heading("exact middles"),
        "elsewhere": Heading("perplexity elsewhere", "min"),
    },
)
