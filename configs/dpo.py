"""SmolLM2-135M-Instruct learns to prefer headlines to first sentences from pairs of both: DPO with LoRA.

    python -m experiments.objectives.pairs pairs
    python -m launch.main --config=configs/dpo.py --workdir=runs/dpo --config.data.source=jsonl:pairs

On two cores that much other work shared, 20 min: the loss of a step's pairs falls from 0.693 at the start to 0.432 at
step 6, 0.321 at step 10 and 0.163 at step 16.

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
