"""SmolLM2-135M-Instruct learns a form from rewards alone: short headlines without quotation marks or a full stop.

    python -m launch.main --config=configs/grpo.py --workdir=runs/grpo

On one core that much other work shared, 193 s of processor time: of one headline to each of 32 held-out articles, the
share that is short rises from 0.16 to 0.88, and the share that is clean from 0.66 to 1.00.

No headline of an editor is read: the model writes eight to each article, and the two functions of this file give them
rewards. They ask for a form alone, so nothing holds a headline to its article but what the model has learned before:
`grounded` of `lowrank.objectives.rewards` asks for the article's words, and `--config.objective.beta=0.05` holds the
model to its start. `--config.objective.loss=dr_grpo` is another loss of `lowrank.objectives.policy_losses`.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import common
from configs.quickstart import PROMPT

MAX_NEW = 16  # tokens


def short(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """1 for a text of two to six words that ends by itself; else 0."""
    both = zip(completions, completion_ids, strict=True)
    return [float(2 <= len(text.split()) <= 6 and len(ids) < MAX_NEW) for text, ids in both]


def clean(completions: Sequence[str]) -> list[float]:
    """1 for a text on one line without quotation marks, asterisks and a full stop at its end; else 0."""
    texts = [text.strip() for text in completions]
    return [float(bool(text) and not set('"“”*\n') & set(text) and text[-1] != ".") for text in texts]


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    return common.new(
        seed=0,
        steps=12,
        objective={
            "name": "grpo",
            "reward_funcs": ("configs.grpo.short", "configs.grpo.clean"),
            "group_size": 8,
            "max_new": MAX_NEW,
            "temperature": 0.8,
        },
        model={"name": "smollm2-135m", "remat": "dots"},
        **common.method(arg, "lora", rank=8, alpha=16.0, target=r".*/(q|k|v|o|gate|up|down)/kernel"),
        data={
            "source": "bbc_news",
            "template": PROMPT,
            "seq_len": 60,
            "batch_size": 16,
        },
        optim={"name": "adamw", "lr": 1e-3, "schedule": "linear", "warmup": 0, "clip": 1.0},
        eval={"split": "test", "max_examples": 32},
        logits_chunk_tokens=128,
        log_every=1,
    )
