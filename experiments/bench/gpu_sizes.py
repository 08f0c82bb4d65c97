"""What both sides of a GPU's benchmark share: the sizes of the runs, and the line that reports a step."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASES = Path(__file__).parent / "bases"
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
PEAK = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12, "NVIDIA L4": 121e12}  # dense bfloat16
TINY = {"vocab_size": 512, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 128}


class Variant(NamedTuple):
    """A method on a base: its name, the arguments of peft's LoraConfig that make it, and the scheme of the base."""

    name: str
    peft: Mapping[str, Any] = {}
    quantize: str | None = None


VARIANTS = {
    "lora": Variant("lora"),
    "qlora": Variant("lora", quantize="nf4"),
    "dora": Variant("dora", {"use_dora": True}),
}


class Size(NamedTuple):
    """A run: rows of `length` tokens through the base in `folder`, `steps` of which are timed."""

    folder: str
    overrides: Mapping[str, Any]  # of the model's config
    length: int
    rank: int
    steps: int


def size_of(base: str, toy: bool) -> Size:
    """The size of a base's run."""
    folder = str(BASES / base)
    return Size(folder, TINY, 32, 2, 3) if toy else Size(folder, {}, 2048, 16, 10)


def batch_rows(size: Size, memory: int) -> int:
    """The rows of a batch: 4 on a device of more than 100 GB, else 2, without rematerialization."""
    return 4 if size.overrides or memory > 100e9 else 2


def model_flops(config: Any, tokens: int) -> float:
    """4ND: N the entries that a token is multiplied with, D the tokens; attention's own products are left out."""
    c = config
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return 4.0 * tokens * (c.layers * (attention + 3 * c.width * c.hidden) + c.width * c.vocab_size)


def report_line(
    run: str,
    side: str,
    seconds: Sequence[float],
    tokens: int,
    flops: float,
    memory: int | None,
    losses: Sequence[float],
    device: str = "",
) -> str:
    """The JSON line of a step: seconds, tokens per second, the share of the device's peak if known, and memory."""
    median = statistics.median(seconds)
    peak = next((value for name, value in PEAK.items() if device.startswith(name)), None)
    found = {
        "seconds": median,
        "range": [min(seconds), max(seconds)],
        "tokens_per_second": tokens / median,
        "mfu": flops / median / peak if peak else None,
        "peak_bytes": memory,
        "losses": [losses[0], losses[-1]],
    }
    return json.dumps({"steps": {run: {side: found}}})
