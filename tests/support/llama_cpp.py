"""GGUF files as llama.cpp's converter writes them: keys and names of the `gguf` package, and the converter's rules.

https://github.com/ggml-org/llama.cpp/tree/master/conversion, one class per architecture.
"""

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

LLAMAS = ("llama", "granite", "smollm3")  # the converter's subclasses of its LlamaModel
ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def gguf_metadata(hf: dict, arch: str) -> dict[str, Any]:
    """The metadata that the converter writes for a config, by their keys in the file."""
    writer = gguf.GGUFWriter(None, arch)
    OWN.get(arch, _text)(writer, hf)
    return {key: entry.value for key, entry in writer.kv_data[0].items()}


def converted(arrays: dict[str, np.ndarray], arch: str, heads: int = 4, kv_heads: int = 2) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as the converter writes them."""
    layers = 1 + max((int(part) for name in arrays for part in name.split(".") if part.isdigit()), default=0)
    out = {}
    for hf, x in arrays.items():
        name = gguf_name(hf, arch, layers)
        if arch == "gptneox" and ".attn_qkv." in name:
            x = x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        if arch in LLAMAS and (".attn_q." in name or ".attn_k." in name):
            x = interleave(x, heads if ".attn_q." in name else kv_heads)
        if arch.startswith("gemma") and hf.endswith("norm.weight"):
            x = x + 1
        if arch == "gpt2" and name.startswith("blk.") and x.ndim == 2:
            x = x.T
        out[name] = x
    return out


def gguf_name(hf: str, arch: str, layers: int) -> str:
    """llama.cpp's name for a tensor, of those that it loads for this architecture."""
    found = gguf.get_tensor_name_map(ARCHS[arch], layers).get_type_and_name(hf, try_suffixes=(".weight", ".bias"))
    kind, name = found or (None, "")
    assert kind in gguf.MODEL_TENSORS[ARCHS[arch]], f"llama.cpp has no {hf} in {arch}"
    return name


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to the rows of Llama's q and k."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _sizes(w: gguf.GGUFWriter, hf: dict, kv: bool = True) -> None:
    w.add_context_length(hf["max_position_embeddings"])
    w.add_embedding_length(hf["hidden_size"])
    w.add_block_count(hf["num_hidden_layers"])
    w.add_feed_forward_length(hf["intermediate_size"])
    w.add_head_count(hf["num_attention_heads"])
    if kv:
        w.add_head_count_kv(hf["num_key_value_heads"])


def _text(w: gguf.GGUFWriter, hf: dict) -> None:
    """What most models have, and the few keys that some of them have besides."""
    _sizes(w, hf)
    w.add_rope_freq_base(hf["rope_theta"])
    w.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    if "head_dim" in hf and w.arch != "granite":
        w.add_key_length(hf["head_dim"])
        w.add_value_length(hf["head_dim"])
    _yarn(w, hf.get("rope_scaling") or {})
    if w.arch in LLAMAS:
        w.add_vocab_size(hf["vocab_size"])
        w.add_rope_dimension_count(hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]))
    if "rope_local_base_freq" in hf:
        w.add_rope_freq_base_swa(hf["rope_local_base_freq"])
    if "sliding_window" in hf:
        w.add_sliding_window(hf["sliding_window"])
    factors = {
        "attention_multiplier": w.add_attention_scale,
        "embedding_multiplier": w.add_embedding_scale,
        "residual_multiplier": w.add_residual_scale,
        "logits_scaling": w.add_logit_scale,
    }
    for name, add in factors.items():
        if hf.get(name):
            add(hf[name])


def _yarn(w: gguf.GGUFWriter, scaling: dict) -> None:
    if scaling.get("rope_type") != "yarn":
        return
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(scaling["factor"])
    w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    more = {
        "attention_factor": w.add_rope_scaling_yarn_attn_factor,
        "beta_fast": w.add_rope_scaling_yarn_beta_fast,
        "beta_slow": w.add_rope_scaling_yarn_beta_slow,
    }
    for name, add in more.items():
        if name in scaling:
            add(scaling[name])


def _gemma(w: gguf.GGUFWriter, hf: dict) -> None:
    """Gemma 1 and 2, whose theta is llama.cpp's default."""
    _sizes(w, hf)
    w.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    w.add_key_length(hf["head_dim"])
    w.add_value_length(hf["head_dim"])
    if w.arch == "gemma2":
        w.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        w.add_final_logit_softcapping(hf["final_logit_softcapping"])
        w.add_sliding_window(hf["sliding_window"])


def _phi3(w: gguf.GGUFWriter, hf: dict) -> None:
    _sizes(w, hf)
    original = hf.get("original_max_position_embeddings", hf["max_position_embeddings"])
    w.add_rope_scaling_orig_ctx_len(original)
    w.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    share = hf.get("partial_rotary_factor", 1.0)
    w.add_rope_dimension_count(int(share * hf["hidden_size"]) // hf["num_attention_heads"])
    w.add_rope_freq_base(hf["rope_theta"])
    w.add_sliding_window(hf.get("sliding_window") or 0)
    if hf.get("rope_scaling"):
        more = np.log(hf["max_position_embeddings"] / original)
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + more / np.log(original))))


def _gpt_neox(w: gguf.GGUFWriter, hf: dict) -> None:
    _sizes(w, hf, kv=False)
    w.add_rope_dimension_count(int(hf["rotary_pct"] * (hf["hidden_size"] // hf["num_attention_heads"])))
    w.add_parallel_residual(hf.get("use_parallel_residual", True))
    w.add_layer_norm_eps(hf["layer_norm_eps"])


def _gpt2(w: gguf.GGUFWriter, hf: dict) -> None:
    w.add_block_count(hf["n_layer"])
    w.add_context_length(hf["n_positions"])
    w.add_embedding_length(hf["n_embd"])
    w.add_feed_forward_length(4 * hf["n_embd"])
    w.add_head_count(hf["n_head"])
    w.add_layer_norm_eps(hf.get("layer_norm_epsilon", 1e-5))


OWN: dict[str, Callable[[gguf.GGUFWriter, dict], None]] = {
    "gemma": _gemma,
    "gemma2": _gemma,
    "phi3": _phi3,
    "gptneox": _gpt_neox,
    "gpt2": _gpt2,
}
