"""The configs of the papers' runs. Their models are folders with a `config.json` alone, which is enough to plan a run.

`--config.model.name=DIR` names a folder or hub id with the weights. Those of GPT-3 were never published, and its
checkpoints would keep q, k and v in one kernel: `llama-175b` has its layers, width and parameters, with kernels apart.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common

MODELS = "experiments/paper_models"
MNLI = ("entailment", "neutral", "contradiction")


def mnli(model: str, steps: int, batch_size: int, seq_len: int, **optim: Any) -> ConfigDict:
    """MultiNLI as classification by a new head, sharded over all devices of a slice."""
    return common.new(
        steps=steps,
        objective="classification",
        model={"name": f"{MODELS}/{model}", "precision": "bf16_f32"},
        data={
            "source": "tfds:glue/mnli",
            "split": "train[:98%]",
            "template": "{premise} {hypothesis}",
            "labels": MNLI,
            "seq_len": seq_len,
            "batch_size": batch_size,
        },
        optim={"name": "adamw", "schedule": "linear", **optim},
        mesh={"data": 1, "fsdp": -1},
        eval={"max_examples": 0},
        log_every=100,
    )


MNLI_SPLITS = ("train[98%:]", "validation_matched")


def instructions(
    model: str, source: str, template: str, completion: str, steps: int, batch_size: int, seq_len: int, **optim: Any
) -> ConfigDict:
    """Language modeling with the loss on the answers of a TFDS dataset, sharded over all devices of a slice."""
    return common.new(
        steps=steps,
        objective="causal_lm",
        model={"name": f"{MODELS}/{model}", "precision": "bf16_f32"},
        data={
            "source": source,
            "split": "train[:98%]",
            "template": template,
            "completion": completion,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "prompt_loss_weight": 0.0,
        },
        optim={"name": "adamw", "schedule": "cosine", **optim},
        mesh={"data": 1, "fsdp": -1},
        eval={"max_examples": 1500},  # all 1319 of GSM8K's test split
        log_every=100,
    )


GSM8K_SPLITS = ("train[98%:]", "test")
HELD_OUT_SPLITS = ("train[98%:99%]", "train[99%:]")
