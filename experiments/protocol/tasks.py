"""The configs of the small studies on BBC News: `topics` names an article's section, `headlines` writes its title.

One core of two takes about 25 s for a run of `topics` and 90 s for one of `headlines`, of which 12 s are the start.
"""

from ml_collections import ConfigDict

from configs import common


def topics() -> ConfigDict:
    """MiniLM-L6 and a new head, scored by accuracy; validation has 224 articles and test 193."""
    return common.new(
        steps=40,
        objective="classification",
        model={"name": "minilm-l6", "remat": "none"},
        data={"source": "bbc_news", "split": "train", "seq_len": 32, "batch_size": 16},
        optim={"name": "adamw", "schedule": "linear", "warmup": 4, "weight_decay": 0.01},
        eval={"max_examples": 0},
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
        eval={"max_examples": 32},
        log_every=4,
    )
