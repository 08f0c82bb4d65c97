"""The tasks of the small studies on BBC News, and what their models knew before: scores of what they forget.

`topics`: MiniLM-L6 names an article's section. It was pretrained for embeddings, by which it finds an article.
`headlines`: SmolLM2-135M writes an article's title. It was pretrained on running text.
One core of two takes about 25 s for a run of `topics` and 90 s for one of `headlines`, of which 12 s are the start.
"""

import numpy as np
from ml_collections import ConfigDict

from configs import common
from experiments.protocol.model import Model, embed_articles
from lowrank.objectives import causal_lm

FLUENCY_ARTICLES = 4  # about 1,800 tokens
# The test split has 193 articles. A study of small differences adds articles of the validation split, and chooses its
# rates on others of them; no article of either split shares passages with a training article.
TOPICS_SPLITS = ("validation[100:]", "test+validation[:100]")  # 124 and 293 articles
HEADLINES_SPLITS = ("validation[100:164]", "test+validation[:7]")  # 64 and 200 articles


def topics() -> ConfigDict:
    """MiniLM-L6 and a new head, scored by accuracy; validation has 224 articles and test 193."""
    return common.new(
        steps=40,
        objective="classification",
        model={"name": "minilm-l6", "remat": "none"},
        data={"source": "bbc_news", "split": "train", "seq_len": 32, "batch_size": 16},
        optim={"name": "adamw", "schedule": "linear", "warmup": 4, "weight_decay": 0.01},
        eval={"max_examples": 0, "before": False},
        log_every=10,
    )


def headlines() -> ConfigDict:
    """SmolLM2-135M with the loss on the headline alone, scored by the perplexity of 32 held-out headlines."""
    return common.new(
        steps=16,
        objective="causal_lm",
        model={"name": "smollm2-135m", "remat": "dots"},
        data={
            "source": "bbc_news",
            "split": "train",
            "template": "headline",
            "seq_len": 48,
            "batch_size": 4,
            "packing": False,
            "prompt_loss_weight": 0.0,
        },
        optim={"name": "adamw", "schedule": "linear", "warmup": 2},
        logits_chunk_tokens=128,
        eval={"max_examples": 32, "before": False},
        log_every=4,
    )


def retrieval_accuracy(model: Model) -> float:
    """The share of test articles whose embedding is the nearest, among all articles, to that of their headline."""
    titles, texts = (embed_articles(model, template, "test")[0] for template in ("{title}", "{text}"))
    return float(np.mean(np.argmax(titles @ texts.T, axis=1) == np.arange(len(titles))))


def article_perplexity(model: Model) -> float:
    """The perplexity of the running text of the first test articles, on which no run trains."""
    few = min(model.examples or FLUENCY_ARTICLES, FLUENCY_ARTICLES)
    scores = model.evaluate(causal_lm(), split="test", template="text", completion="", max_examples=few)
    return scores["perplexity"]
