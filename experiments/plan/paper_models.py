"""The configs of models whose figures papers print."""

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
    "LLaMA-65B": _llama(80, 8192, 64, 22016),
    "Llama-2-13B": _llama(40, 5120, 40, 13824),
    "a 512 x 64 matrix": (512, 64),
}
