"""SmolLM2-135M-Instruct learns to prefer an article's own headline to worse lines: DPO with LoRA.

    python -m experiments.objectives.pairs pairs
    python -m launch.main --config=configs/dpo.py --workdir=runs/dpo --config.data.source=jsonl:pairs

On two cores, 165 s: on 32 held-out pairs the loss falls from 0.693 to 0.317 and the accuracy is 0.97. The rejected
lines are headlines of other articles, first sentences, and headlines in quoted capitals.

`--config.objective.loss=ipo` is another loss of `lowrank.objectives.preference_losses`, and its options are keys of the
same group, such as `--config.objective.beta=0.5`. Your own records have `prompt`, `chosen` and `rejected`, as text or
as turns.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    return common.new(
        seed=0,
        steps=20,
        objective={"name": "preference", "loss": "dpo", "beta": 0.1},
        model={"name": "smollm2-135m", "remat": "dots"},
        **common.method(arg, "lora", rank=8, alpha=16.0, target=r".*/(q|k|v|o|gate|up|down)/kernel"),
        data={"source": "jsonl:pairs", "split": "train", "seq_len": 128, "batch_size": 4},
        optim={"name": "adamw", "lr": 2e-4, "schedule": "linear", "warmup": 2, "clip": 1.0},
        eval={"split": "test", "max_examples": 32},
        logits_chunk_tokens=256,
        log_every=2,
    )
