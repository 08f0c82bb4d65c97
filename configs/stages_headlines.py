"""SmolLM2-135M-Instruct reads BBC news, learns to write headlines, then to prefer them to first sentences: one command.

    python -m experiments.objectives.pairs pairs
    python -m launch.main --config=configs/stages_headlines.py --workdir=runs/stages

On one core, 3 min of processor time for the second command. Before and after each stage, on 8 held-out examples:
perplexity of articles 46.8 and 43.4, and of headlines 1131 and 215; loss of pairs 0.693 and 0.279, with all 8 headlines
preferred.

`--config.stages[2].objective.loss=ipo` changes one stage, and `--config.data.seq_len=256` all of them.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    headlines = {"source": "jsonl:pairs", "template": "{prompt}", "completion": "{chosen}"}
    return common.new(
        seed=0,
        steps=8,
        objective="causal_lm",
        model={"name": "smollm2-135m", "remat": "dots"},
        **common.method(arg, "lora", rank=8, alpha=16.0, target=r".*/(q|k|v|o|gate|up|down)/kernel"),
        data={"source": "bbc_news", "split": "train", "seq_len": 96, "batch_size": 2},
        optim={"name": "adamw", "lr": 1e-3, "schedule": "linear", "warmup": 1, "clip": 1.0},
        eval={"split": "test", "max_examples": 8},
        checkpoint={"every": 4, "keep": 1},
        logits_chunk_tokens=256,
        log_every=2,
        stages=[
            {"name": "continued", "data": {"template": "text", "packing": True}},
            {"name": "sft", "data": headlines},
            {
                "name": "dpo",
                "objective": {"name": "preference", "loss": "dpo", "beta": 0.1},
                "data": {"source": "jsonl:pairs"},
                "optim": {"lr": 2e-4},
            },
        ],
    )
