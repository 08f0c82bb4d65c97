"""A GGUF file in the form of a Hugging Face checkpoint: its config, and its tensors by their Hugging Face names.

The changes of llama.cpp's converter are undone: it reorders the rows of Llama's q and k for its rope, adds 1 to Gemma's
norms, and transposes GPT-2's kernels.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lowrank.core import schema
from lowrank.core.errors import UserError, unknown
from lowrank.core.json_types import ModelConfig
from lowrank.models.rope_scaling import RopeScaling
from lowrank.pretrained import gguf_tokenizer, hf_files
from lowrank.pretrained.families import FAMILIES
from lowrank.pretrained.gguf_file import GGUF, open_gguf
from lowrank.pretrained.size_limits import check_sizes
from lowrank.pretrained.tensor_reader import StoredTensor, add_constant, deinterleave_heads, interleave_projections
from lowrank.pretrained.tokenizer import Tokenizer

LLAMA_LIKE = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
GPT2 = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
# The layer count of the 27B model, whose attention scale llama.cpp takes from the width; the metadata do not tell.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma": "gemma",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
    "gptneox": "gpt_neox",
    "gpt2": "gpt2",
}
INTERLEAVED = ("llama", "granite", "smollm3")  # the converter reorders the rows of q and k
GRANITE = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
YARN = {  # as llama.cpp's converter stores the numbers of YaRN
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
# What changes the computation, and what it is where it does not. OLMo-3, for one, is olmo2 with a window.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "expert_count": 0,
    **dict.fromkeys(GRANITE.values(), 0),
}
_GEMMA = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
READ = {"gemma2": _GEMMA, "gemma3": _GEMMA, "phi3": ("attention.sliding_window",), "granite": tuple(GRANITE.values())}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # read with the config


class GGUFSource:
    """A GGUF file as a `CheckpointSource`. Raises UserError for a corrupt file and an unknown architecture."""

    def __init__(self, path: Path, name: str):
        self.file, self.name, self.where = open_gguf(path), name, str(path)
        self.arch = self.file.get("general.architecture")
        if self.arch not in MODEL_TYPES:
            raise unknown("GGUF architecture", self.arch, MODEL_TYPES)
        try:
            config = _hf_config(self.file, self.arch)
        except ArithmeticError as e:  # a size of zero
            raise UserError(f"{path}: its metadata cannot be used: {e}") from None
        schema.check(self.where, config, ModelConfig)
        check_sizes(self.where, config, self.file.tensors)
        self.hf_config = config | FAMILIES[config["model_type"]].hf_config(hf_files.parse_config(self.where, config))

    def has_tokenizer(self) -> bool:
        """True: every GGUF file of a language model holds its vocabulary."""
        return True

    def tokenizer(self) -> Tokenizer:
        """The tokenizer rebuilt from the file's vocabulary and merges or scores."""
        return gguf_tokenizer.build_tokenizer(self.file)

    def tensors(self, wanted: Sequence[str]) -> dict[str, StoredTensor]:
        """All tensors; those that are `wanted` under their Hugging Face names, the rest under their own."""
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        names = gguf.get_tensor_name_map(arch, self.file.get(f"{self.arch}.block_count"))
        stored = {k: v for k, v in self.file.tensors.items() if k not in ROPE_TENSORS}
        tensors = {}
        for name in [*wanted, "lm_head.weight"]:
            stem, _, suffix = name.rpartition(".")
            theirs = f"{names.get_name(stem)}.{suffix}"
            if theirs in stored:
                tensors[name] = self._restored(theirs, stored.pop(theirs))
        return tensors | stored

    def _restored(self, name: str, tensor: StoredTensor) -> StoredTensor:
        part = name.split(".")[-2]
        if self.arch == "gptneox" and part == "attn_qkv":
            return interleave_projections(tensor, self.hf_config["num_attention_heads"])
        if self.arch in INTERLEAVED and part in ("attn_q", "attn_k"):
            return deinterleave_heads(tensor, self.hf_config["head_dim"])
        if self.arch.startswith("gemma") and part.endswith("norm"):
            return add_constant(tensor, -1.0)
        if self.arch == "gpt2" and len(tensor.shape) == 2 and name.startswith("blk."):
            return dataclasses.replace(tensor, shape=tensor.shape[::-1], flipped=True)
        return tensor


def _hf_config(file: GGUF, arch: str) -> dict[str, Any]:
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: tensor 'token_embd.weight' is missing: the file is not a complete model")
    for key, neutral in NEUTRAL.items():
        if key not in READ.get(arch, ()) and (value := file.metadata.get(f"{arch}.{key}", neutral)) != neutral:
            raise UserError(f"{file.path}: {arch}.{key}={value!r} is not supported")
    fields = GPT2 if arch == "gpt2" else LLAMA_LIKE
    fields = {**fields, "rms_norm_eps": "attention.layer_norm_epsilon"} if arch == "gptneox" else fields
    config = {"model_type": MODEL_TYPES[arch]} | {hf: _number(file, f"{arch}.{ours}") for hf, ours in fields.items()}
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {hf: file.get(f"tokenizer.ggml.{key}_token_id", -1) for hf, key in keys.items()}
    config |= {hf: token for hf, token in ids.items() if token >= 0}
    if arch == "gpt2":
        return config
    own = FIELDS.get(arch, lambda file, config: {})
    return config | _attention(file, arch, config) | _rope(file, arch) | own(file, config)


def _number(file: GGUF, key: str, default: float | None = None) -> float:
    """A number; a float32 becomes the shortest decimal that rounds to it."""
    value = file.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{file.path}: metadata {key!r} is {value!r}: it must be one number, the same for all layers")
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _attention(file: GGUF, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = _number(file, f"{arch}.attention.key_length", width // heads)
    fields = {
        "num_key_value_heads": _number(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    if arch in GEMMA_27B:
        large = config["num_hidden_layers"] == GEMMA_27B[arch]
        fields["query_pre_attn_scalar"] = width // heads if large else head_dim
        fields["sliding_window"] = _number(file, f"{arch}.attention.sliding_window")
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if f"{arch}.{cap}" in file.metadata:
                fields[cap] = _number(file, f"{arch}.{cap}")
    return fields


def _phi3(file: GGUF, config: dict[str, Any]) -> dict[str, Any]:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    original = _number(file, "phi3.rope.scaling.original_context_length", config["max_position_embeddings"])
    fields = {
        "sliding_window": _number(file, "phi3.attention.sliding_window", 0) or None,
        "partial_rotary_factor": _number(file, "phi3.rope.dimension_count", head_dim) / head_dim,
        "original_max_position_embeddings": original,
    }
    if "rope_factors_long.weight" not in file.tensors or "rope_factors_short.weight" not in file.tensors:
        return fields
    factors = {}
    for name in ("long", "short"):
        tensor = file.tensors[f"rope_factors_{name}.weight"]
        factors[f"{name}_factor"] = [float(str(np.float32(x))) for x in tensor.read(0, tensor.shape[0])]
    return fields | {"rope_scaling": {"rope_type": "longrope", **factors}}


def _granite(file: GGUF, config: dict[str, Any]) -> dict[str, Any]:
    del config
    return {hf: _number(file, f"granite.{ours}", 1.0) for hf, ours in GRANITE.items()}


def _gpt_neox(file: GGUF, config: dict[str, Any]) -> dict[str, Any]:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {
        "layer_norm_eps": config["rms_norm_eps"],
        "rotary_pct": _number(file, "gptneox.rope.dimension_count", head_dim) / head_dim,
        "use_parallel_residual": bool(file.get("gptneox.use_parallel_residual", True)),
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
    }


def _gemma3(file: GGUF, config: dict[str, Any]) -> dict[str, Any]:
    del config
    return {"rope_local_base_freq": _number(file, "gemma3.rope.freq_base_swa", 10000.0)}


FIELDS: dict[str, Callable[[GGUF, dict[str, Any]], dict[str, Any]]] = {  # of one architecture alone
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "gptneox": _gpt_neox,
}


def _rope(file: GGUF, arch: str) -> dict[str, Any]:
    theta = _number(file, f"{arch}.rope.freq_base", 10000.0)
    kind = file.get(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return {"rope_theta": theta, "rope_scaling": _llama3_scaling(file, theta)}
    if kind == "none":
        return {"rope_theta": theta}
    scaling = {"rope_type": kind, "factor": _number(file, f"{arch}.rope.scaling.factor")}
    if kind == "yarn":
        original = _number(file, f"{arch}.rope.scaling.original_context_length", 0)
        multiplier = _number(file, f"{arch}.rope.scaling.attn_factor", 1.0)  # of YaRN's own factor, as llama.cpp has it
        attention = multiplier * RopeScaling("yarn", scaling["factor"]).of_cosines
        scaling |= {"original_max_position_embeddings": original or None}
        scaling |= {"attention_factor": attention} if multiplier != 1 else {}
        keys = {hf: f"{arch}.rope.scaling.{ours}" for hf, ours in YARN.items()}
        scaling |= {hf: _number(file, key) for hf, key in keys.items() if key in file.metadata}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3_scaling(file: GGUF, theta: float) -> dict[str, Any]:
    """Llama 3's rope scaling, of which GGUF stores only the divisor of each frequency."""
    tensor = file.tensors["rope_freqs.weight"]
    factors = tensor.read(0, tensor.shape[0])
    factor, low, high, positions = float(factors.max()), 1.0, 4.0, 8192
    turns = positions * theta ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)  # within the first positions
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise UserError(f"{file.path}: tensor 'rope_freqs.weight' is not the rope scaling of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions,
    }
