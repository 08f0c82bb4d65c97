"""A few steps on a local model and local records, for trying things out in seconds.

    python -m launch.main --config=configs/tiny.py --workdir=runs/tiny \
        --config.model.name=/path/to/hf_model --config.data.source=jsonl:/path/to/records.jsonl

It trains on the CPU in seconds with a model of a few thousand parameters.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    return common.new(
        seed=0,
        steps=8,
        objective="causal_lm",
        model={"name": "smollm2-135m"},
        **common.method(arg, "lora", rank=2, alpha=4.0),
        data={"source": "jsonl:records.jsonl", "split": "train", "seq_len": 32, "batch_size": 8},
        optim={"lr": 1e-2, "schedule": "linear", "warmup": 2},
        checkpoint={"every": 2, "keep": 2},
        log_every=1,
    )
