"""SmolLM2-135M learns to write the headline of a BBC news article; LoRA on the attention's queries and values.

    python -m launch.main --config=configs/smollm2_headlines.py --workdir=runs/headlines

Another method, with its options: `--config=configs/smollm2_headlines.py:method=dora,rank=4`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    return common.new(
        seed=0,
        steps=60,
        objective="causal_lm",
        model={"name": "smollm2-135m", "remat": "dots"},
        method=common.method(arg, "lora", rank=8, alpha=16.0, target=r".*attn/(q|v)/kernel"),
        data={
            "source": "bbc_news",
            "split": "train",
            "template": "headline",
            "seq_len": 256,
            "batch_size": 8,
            "prompt_loss_weight": 0.1,
        },
        optim={"name": "adamw", "lr": 1e-3, "schedule": "cosine", "warmup": 6, "clip": 1.0},
        eval={"split": "test", "texts": 100, "max_new": 24},
        checkpoint={"every": 20, "keep": 2},
        log_every=5,
    )
