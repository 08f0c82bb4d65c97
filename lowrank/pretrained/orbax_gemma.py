"""Gemma 1, 2 and 3 in the Orbax checkpoints that Google publishes on Kaggle, in the form of a Hugging Face checkpoint.

Their arrays are named `transformer/layer_0/attn/q_einsum/w`, and have heads as an axis; there is no config, which
follows from the shapes. Shapes: V vocabulary, D width, N query heads, K key heads, H head width, F hidden width.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lowrank.core.errors import UserError, plural
from lowrank.pretrained import hf_files, tokenizer
from lowrank.pretrained.families import FAMILIES
from lowrank.pretrained.orbax_files import Change, StoredArray, is_orbax, open_arrays, stored_tensor
from lowrank.pretrained.tensor_reader import StoredTensor
from lowrank.pretrained.tokenizer import Tokenizer

LAYER = re.compile(r"transformer/layer_(\d+)/(.*)")
NORMS = {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
NORMS |= {"pre_attention_norm": "input_layernorm"}
PLAIN_NORMS = {**NORMS, "pre_ffw_norm": "post_attention_layernorm"}  # of Gemma 1
POST_NORMS = {
    **NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
SMALL_GEMMA3 = (18, 26)  # the layers of the 270M and the 1B model, whose context is shorter
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}  # the layers of the 27B models, whose attention's scale differs


class OrbaxGemmaSource:
    """An Orbax checkpoint of Gemma as a `CheckpointSource`. Raises UserError for arrays of another model."""

    def __init__(self, path: Path, name: str):
        self.path, self.name, self.where = path, name, str(path)
        self.arrays = open_arrays(_checkpoint_folder(path))
        config = _hf_config(self.where, self.arrays)
        self.hf_config = config | FAMILIES[config["model_type"]].hf_config(hf_files.parse_config(self.where, config))

    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies in the folder."""
        return any((self.path / file).exists() for file in ("tokenizer.json", "tokenizer.model"))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that lies in the folder."""
        return tokenizer.load_tokenizer(self.path, self.hf_config)

    def tensors(self, wanted: Sequence[str]) -> dict[str, StoredTensor]:
        """All tensors of the language model under their Hugging Face names; the log says how many others there are."""
        del wanted
        norms = POST_NORMS if _has(self.arrays, "post_attention_norm/scale") else PLAIN_NORMS
        tensors, skipped = {}, []
        for name, array in self.arrays.items():
            parts = _parts(name, array, norms)
            skipped += [] if parts else [name]
            tensors |= {hf: stored_tensor(array, change) for hf, change in parts.items()}
        if skipped:
            count = plural(len(skipped), "array")
            logging.info("%s: the language model is read alone; %s skipped, such as %s", self.where, count, skipped[0])
        return tensors


def gemma_folder(path: Path) -> bool:
    """Whether `path`, or one folder in it, is an Orbax checkpoint."""
    try:
        return is_orbax(path) or sum(map(is_orbax, path.iterdir())) == 1
    except OSError:  # a folder that cannot be read is named where its config is looked for
        return False


def _checkpoint_folder(path: Path) -> Path:
    return path if is_orbax(path) else next(folder for folder in path.iterdir() if is_orbax(folder))


def _has(arrays: Mapping[str, Any], end: str) -> bool:
    return f"transformer/layer_0/{end}" in arrays


def _hf_config(where: str, arrays: Mapping[str, StoredArray]) -> dict[str, Any]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        ends = [arrays[n].shape for n in (name, f"{name}/w") if n in arrays]
        if not ends or len(ends[0]) != rank:
            if any("/token_embedder/" in n for n in arrays):
                files = "put the config.json and the tokenizer of the same model on Hugging Face into the folder"
                raise UserError(f"{where} is a checkpoint of MaxText, which holds no config: {files}")
            raise UserError(f"{where} has no array {name!r} of {plural(rank, 'dimension')}: it is not Gemma in Orbax")
        return ends[0]

    layers = len({match[1] for name in arrays if (match := LAYER.fullmatch(name))})
    vocabulary, width = shape("transformer/embedder/input_embedding", 2)
    first = "transformer/layer_0"
    heads, head_dim, _ = shape(f"{first}/attn/attn_vec_einsum", 3)
    grouped = _has(arrays, "attn/kv_einsum/w")
    kind = "gemma2" if _has(arrays, "post_attention_norm/scale") else "gemma"
    kind = "gemma3_text" if _has(arrays, "attn/_query_norm/scale") else kind
    config = {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape(f"{first}/mlp/linear", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shape(f"{first}/attn/kv_einsum", 4)[1] if grouped else heads,
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": width // heads if layers == SCALED_BY_WIDTH.get(kind) else head_dim,
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    }
    if kind != "gemma3_text":
        return config
    if layers in SMALL_GEMMA3:
        return config | {"max_position_embeddings": 32768, "sliding_window": 512}
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    return config | {"max_position_embeddings": 131072, "sliding_window": 1024, **scaling}


def _parts(name: str, array: StoredArray, norms: Mapping[str, str]) -> dict[str, Change]:
    """The tensors that an array holds, and how each is made of it; empty for an array outside of the language model."""
    if name == "transformer/embedder/input_embedding":
        return {"model.embed_tokens.weight": lambda x: x}
    if name == "transformer/final_norm/scale":
        return {"model.norm.weight": lambda x: x}
    match = LAYER.fullmatch(name)
    if not match:
        return {}
    layer, inner = f"model.layers.{match[1]}", match[2].removesuffix("/w").removesuffix("/scale")
    if inner in norms:
        return {f"{layer}.{norms[inner]}.weight": lambda x: x}
    made = _KERNELS.get(inner, lambda array: {})(array)
    return {f"{layer}.{hf}.weight": change for hf, change in made.items()}


def _heads(x_NxDxH: np.ndarray) -> np.ndarray:
    return x_NxDxH.transpose(0, 2, 1).reshape(-1, x_NxDxH.shape[1])


def _gates(array: StoredArray) -> dict[str, Change]:
    """Gate and up, `[2, D, F]` or, in later checkpoints, `[2, F, D]`, of which F is the larger in every Gemma."""
    flat: Change = np.transpose if array.shape[1] < array.shape[2] else (lambda x: x)
    return {"mlp.gate_proj": lambda x: flat(x[0]), "mlp.up_proj": lambda x: flat(x[1])}


_KERNELS: dict[str, Callable[[StoredArray], dict[str, Change]]] = {
    "attn/q_einsum": lambda array: {"self_attn.q_proj": _heads},
    "attn/kv_einsum": lambda array: {
        "self_attn.k_proj": lambda x: _heads(x[0]),
        "self_attn.v_proj": lambda x: _heads(x[1]),
    },
    "attn/qkv_einsum": lambda array: {
        f"self_attn.{n}_proj": lambda x, i=i: _heads(x[i])  # type: ignore[misc]
        for i, n in enumerate("qkv")
    },
    "attn/attn_vec_einsum": lambda array: {"self_attn.o_proj": lambda x: x.reshape(-1, x.shape[-1]).T},
    "mlp/gating_einsum": _gates,
    "mlp/linear": lambda array: {"mlp.down_proj": np.transpose},
}
