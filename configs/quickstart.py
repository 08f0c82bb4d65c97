"""SmolLM2-135M-Instruct learns to write BBC headlines in minutes on a CPU; LoRA on every kernel of attention and MLP.

    make quickstart

On two cores without AVX-512, 286 s (349 s with a fresh .venv): ROUGE-L 0.184 before and 0.239 after, on 100 held-out
articles.
"""

from ml_collections import ConfigDict

from configs import common

# The model's own chat format without its long system message, and the start of the answer, so that the model as it
# comes has a fair chance; `python -m experiments.quickstart.prompts` scores other wordings.
PROMPT = (
    "<|im_start|>user\nWrite a headline of at most six words for this BBC News article.\n\n{text}<|im_end|>\n"
    "<|im_start|>assistant\nHeadline:"
)


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: `method=NAME,KEY=VALUE,...`."""
    kernels = r".*/(q|k|v|o|gate|up|down)/kernel"
    return common.new(
        seed=0,
        steps=36,
        objective="causal_lm",
        model={"name": "smollm2-135m", "remat": "dots"},
        **common.method(arg, "lora", rank=8, alpha=16.0, target=kernels),
        data={
            "source": "bbc_news",
            "template": PROMPT,
            "completion": " {title}",
            "seq_len": 96,
            "batch_size": 8,
            "prompt_loss_weight": 0.0,
        },
        optim={"name": "adamw", "lr": 2e-3, "schedule": "linear", "warmup": 4, "clip": 1.0},
        eval={"split": "test", "max_examples": 24, "texts": 100, "max_new": 16},
        logits_chunk_tokens=128,  # the head leaves out prompts: a step takes five sixths of the time
        log_every=4,
    )
