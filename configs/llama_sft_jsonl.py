"""Instruction tuning of a Llama-like model on your own JSONL records `{"prompt": ..., "completion": ...}`.

    python -m launch.main --config=configs/llama_sft_jsonl.py --workdir=runs/sft \
        --config.model.name=/path/to/hf_model --config.data.source=jsonl:/path/to/records.jsonl

On two cores, 3 min: perplexity of the completion 143.1 before and 18.9 after, on 24 held-out records. In this run the
train.jsonl and test.jsonl of a folder ask SmolLM2 for the headline of the first 600 characters of an article, with

    --config.data.source=jsonl:FOLDER --config.eval.split=test --config.eval.max_examples=24 --config.steps=20
    --config.data.seq_len=256 --config.data.batch_size=4 --config.optim.lr=1e-3 --config.optim.warmup=2

The base and the activations are bfloat16, the adapters float32. All linear maps are adapted, with the learning rates of
LoRA+, and the parameters are sharded over all devices (`mesh.fsdp=-1`). `--config.model.quantize=nf4` (int8, fp8, ...)
keeps the kernels of the blocks in codes: with LoRA that is QLoRA, and with `:method=dora` it is QDoRA on the same maps.
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    target = r"layers/(attn/(q|k|v|o)|mlp/(gate|up|down))/kernel"
    return common.new(
        seed=0,
        steps=1000,
        objective="causal_lm",
        model={
            "name": "smollm2-135m",
            "precision": "bf16",
            "remat": "full",
            "quantize": config_dict.placeholder(str),
        },
        **common.method(arg, "lora", rank=16, alpha=32.0, target=target),
        data={"source": "jsonl:records.jsonl", "split": "train", "seq_len": 1024, "batch_size": 16},
        optim={"lr": 2e-4, "b_ratio": 4.0, "schedule": "cosine", "warmup": 30, "accumulate": 1},
        mesh={"data": 1, "fsdp": -1, "tensor": 1},
        checkpoint={"every": 200, "keep": 2},
        log_every=10,
    )
