"""The command that continues to train a merge: a config of this package, with the changes that the result needs."""

import shlex
from collections.abc import Mapping
from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import hf_files

SFT, CLASSIFY = "configs/llama_sft_jsonl.py", "configs/minilm_bbc_classify.py"
HELD_OUT = {"data.split": "train[:90%]", "eval.split": "train[90%:]"}
ALL = {"optim.lr": 2e-5, "optim.b_ratio": 1.0}  # of full fine-tuning, which has no matrices a and b


def training_command(folder: str, hf_config: Mapping[str, Any], *, whole: bool) -> str:
    """`python -m launch.main ...`: LoRA, or with `whole` every parameter, as new routers and repeated layers need."""
    decoder = isinstance(hf_files.parse_config(folder, dict(hf_config)), DecoderConfig)
    config, name = (SFT, "sft") if decoder else (CLASSIFY, "classify")
    changes: dict[str, Any] = {"model.name": folder, "data.source": "jsonl:records.jsonl"} | (ALL if whole else {})
    changes |= {} if decoder else HELD_OUT
    words = ["python", "-m", "launch.main", f"--config={config}{':method=full' if whole else ''}"]
    words += [f"--workdir=runs/{name}", *(f"--config.{key}={value}" for key, value in changes.items())]
    return shlex.join(words)
