"""The methods whose trained parameters papers print, as configs."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """A number of trained parameters as its source prints it, with its model and method."""

    model: str
    what: str
    method: dict[str, Any]
    printed: str
    source: str


def _lora(rank: int, modules: str) -> dict[str, Any]:
    return {"name": "lora", "rank": rank, "target": rf"layers/(attn|mlp)/({modules})/kernel"}


WIDE = _lora(32, "q|k|v|up|down")
LORA, DORA = "arXiv:2106.09685", "arXiv:2402.09353"
CASES = (
    Case("GPT-3 175B", "LoRA, rank 2 on q, k, v, o", _lora(2, "q|k|v|o"), "18.9M", LORA),
    Case("GPT-3 175B", "LoRA, rank 1 on q, v", _lora(1, "q|v"), "4.7M", LORA),
    Case("RoBERTa-base", "LoRA, rank 8 on q, v", _lora(8, "q|v"), "0.3M", LORA),
    Case("RoBERTa-base", "adapters, width 16, one a layer", {"name": "pfeiffer", "width": 16}, "0.3M", LORA),
    Case("RoBERTa-base", "adapters, width 48, one a layer", {"name": "pfeiffer", "width": 48}, "0.9M", LORA),
    Case("RoBERTa-base", "BitFit", {"name": "bitfit"}, "0.1M", LORA),
    Case("GPT-2 medium", "LoRA, rank 4 on q, v", _lora(4, "q|v"), "0.35M", LORA),
    Case("GPT-2 large", "LoRA, rank 4 on q, v", _lora(4, "q|v"), "0.77M", LORA),
    Case("LLaMA-7B", "LoRA, rank 32 on q, k, v, up, down", WIDE, "0.83 %", DORA),
    Case("LLaMA-7B", "DoRA, rank 32 on q, k, v, up, down", {**WIDE, "name": "dora"}, "0.84 %", DORA),
    Case("Llama-2-13B", "LoRA, rank 2 on q, k, v, o", _lora(2, "q|k|v|o"), "3,276,800", "lecture notes"),
    Case("Llama-2-13B", "LoRA, rank 2 on q, k", _lora(2, "q|k"), "3,276,800", "lecture notes that say q, k"),
    Case(
        "a 512 x 64 matrix", "LoRA, rank 8", {"name": "lora", "rank": 8, "target": "kernel"}, "4,608", "lecture notes"
    ),
)
