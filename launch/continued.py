"""The command that continues to train a merge, or a merged adapter: a config of this package, and its changes."""

import shlex
from collections.abc import Mapping
from typing import Any

from lowrank.models import DecoderConfig
from lowrank.pretrained import hf_files

SFT, CLASSIFY = "configs/llama_sft_jsonl.py", "configs/minilm_bbc_classify.py"
HELD_OUT = {"data.split": "train[:90%]", "eval.split": "train[90%:]"}
ALL = {"optim.lr": 2e-5, "optim.b_ratio": 1.0}  # of full fine-tuning, which has no matrices a and b


def training_command(folder: str, hf_config: Mapping[str, Any], *, whole: bool = False, adapter: str = "") -> str:
    """`python -m launch.main ...`: LoRA, or with `whole` every parameter, as new routers and repeated layers need.

    An `adapter` of the model in `folder` is trained further.
    """
    decoder = isinstance(hf_files.parse_config(folder, dict(hf_config)), DecoderConfig)
    config, name = (SFT, "sft") if decoder else (CLASSIFY, "classify")
    changes: dict[str, Any] = {"model.name": folder, "data.source": "jsonl:records.jsonl"} | (ALL if whole else {})
    changes |= ({"model.adapter": adapter} if adapter else {}) | ({} if decoder else HELD_OUT)
    method = ":method=full" if whole else ":method=adapter" if adapter else ""
    words = ["python", "-m", "launch.main", f"--config={config}{method}"]
    words += [f"--workdir=runs/{name}", *(f"--config.{key}={value}" for key, value in changes.items())]
    return shlex.join(words)
