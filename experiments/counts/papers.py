"""The models and methods whose trained parameters papers print, as configs."""

from typing import Any, NamedTuple

from lowrank.models import DecoderConfig, EncoderConfig

GPT2_LIKE = {"vocab_size": 50257, "norm": "layer", "activation": "gelu_tanh", "gated": False, "tied": True}
GPT2_LIKE |= {"learned_positions": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True}


def _gpt(layers: int, width: int, heads: int, positions: int) -> DecoderConfig:
    size = {"layers": layers, "width": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads}
    return DecoderConfig(**GPT2_LIKE, **size, hidden=4 * width, max_positions=positions)


def _llama(layers: int, width: int, heads: int, hidden: int) -> DecoderConfig:
    size = {"layers": layers, "width": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads}
    return DecoderConfig(vocab_size=32000, **size, hidden=hidden, max_positions=4096)


MODELS: dict[str, DecoderConfig | EncoderConfig | tuple[int, int]] = {
    "GPT-3 175B": _gpt(96, 12288, 96, 2048),
    "GPT-2 medium": _gpt(24, 1024, 16, 1024),
    "GPT-2 large": _gpt(36, 1280, 20, 1024),
    "RoBERTa-base": EncoderConfig(
        vocab_size=50265, max_positions=512, width=768, layers=12, heads=12, hidden=3072, types=1, position_offset=2
    ),
    "LLaMA-7B": _llama(32, 4096, 32, 11008),
    "Llama-2-13B": _llama(40, 5120, 40, 13824),
    "a 512 x 64 matrix": (512, 64),
}


class Case(NamedTuple):
    """A figure as its source prints it, and what it is of."""

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
