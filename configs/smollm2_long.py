"""SmolLM2-135M goes from its 8,192 tokens to 32,768: YaRN, and LoRA or LongLoRA on rows of the new length.

    python -m launch.main --config=configs/smollm2_long.py --workdir=runs/long \
        --config.data.source=jsonl:/path/to/long_texts.jsonl
    python -m launch.evaluate --config=configs/smollm2_long.py --workdir=runs/long \
        --config.data.source=jsonl:/path/to/long_texts.jsonl --long=price,sliding,positions,passkey,kv

`:method=longlora,group=8192` trains norms and embeddings too, with attention in groups of a quarter of a row.

It is for a slice of 16 TPU chips, one row on each. `python -m launch.preflight --topology=v5e:4x4` compiles it with
LongLoRA: a chip needs 3.005 GB of its 16 GiB (2.743 GB by formula), and a step at least 0.89 s. With LoRA it needs
2.487 GB by formula.

The records have long texts in the field `text`; shorter ones are packed. `--config.model.rope=ntk` is another way to
stretch RoPE.
"""

from ml_collections import ConfigDict

from configs import common

CONTEXT = 32_768


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    target = r"layers/attn/(q|k|v|o)/kernel"
    return common.new(
        seed=0,
        steps=200,
        objective="causal_lm",
        model={"name": "smollm2-135m", "precision": "bf16", "remat": "full", "context": CONTEXT, "rope": "yarn"},
        **common.method(arg, "lora", rank=16, alpha=32.0, target=target),
        data={
            "source": "jsonl:long_texts.jsonl",
            "split": "train",
            "template": "text",
            "seq_len": CONTEXT,
            "batch_size": 16,
        },
        optim={"lr": 2e-4, "schedule": "cosine", "warmup": 20, "clip": 1.0},
        eval={"split": "test", "long": {"lengths": (4096, 8192, 16_384, 32_768), "stride": 8192}},
        mesh={"data": 1, "fsdp": -1},
        checkpoint={"every": 50, "keep": 2},
        log_every=5,
    )
