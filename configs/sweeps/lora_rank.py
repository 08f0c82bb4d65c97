"""The rank of LoRA on news headlines: ranks 1 to 16, three seeds each, by the perplexity of held-out headlines.

    python -m launch.sweep --study=configs/sweeps/lora_rank.py --folder=runs/lora_rank --workers=2
    python -m launch.status runs/lora_rank

Fifteen runs of SmolLM2-135M. On other files, in seconds:

    python -m launch.sweep --study=configs/sweeps/lora_rank.py:tiny --folder=runs/ranks \
        --config.model.name=/path/to/hf_model --config.data.source=jsonl:/path/to/records.jsonl
"""

from configs import smollm2_headlines, tiny
from lowrank.sweeps.axes import axis, product, seeds
from lowrank.sweeps.study import Study


def get_study(arg: str | None = None) -> Study:
    """`arg`: `tiny` for the config of a few steps."""
    base = tiny.get_config() if arg == "tiny" else smollm2_headlines.get_config()
    base.eval = {"split": base.data.split if arg == "tiny" else "test", "max_examples": 48}
    ranks = [1, 2, 4, 8] if arg == "tiny" else [1, 2, 4, 8, 16]
    points = product(axis("method.rank", ranks), seeds(3))
    return Study("lora_rank", base, points, metric="perplexity", baseline={"method.rank": 8})
