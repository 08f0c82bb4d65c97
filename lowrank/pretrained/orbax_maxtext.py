"""MaxText's Orbax checkpoints beside the `config.json` and the tokenizer of the same model from Hugging Face.

A checkpoint holds no config. Its layers are scanned, with L as axis 1, or are `layers_0`, `layers_1` and so on. The
queries of Llama, Mistral and Mixtral are stored divided by the root of the head's width. Where rope has Llama 3.1's
form, the two numbers that it rotates together are neighbours, and not half a head apart as in Hugging Face's layout.
Shapes: V vocabulary, D width, L layers, N heads, H head width, F hidden width, E experts.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from lowrank.core.errors import UserError, plural, unknown
from lowrank.pretrained.orbax_files import Change, StoredArray, is_orbax, open_arrays, stored_tensor
from lowrank.pretrained.resolve_directory import DirectorySource
from lowrank.pretrained.size_limits import check_sizes
from lowrank.pretrained.tensor_reader import StoredTensor

LAYER = re.compile(r"decoder/layers(?:_(\d+))?/(.*)")
DIVIDED_QUERIES = {"llama": True, "mistral": True, "mixtral": True, "qwen3": False, "qwen3_moe": False}
OUTSIDE: dict[str, str] = {
    "token_embedder/embedding": "model.embed_tokens",
    "decoder/decoder_norm/scale": "model.norm",
    "decoder/logits_dense/kernel": "lm_head",
}
NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "self_attention/query_norm": "self_attn.q_norm",
    "self_attention/key_norm": "self_attn.k_norm",
}
IN_HEADS = {f"self_attention/{name}": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")}  # [D, N, H]
MLP = {"mlp/wi_0": "mlp.gate_proj", "mlp/wi_1": "mlp.up_proj", "mlp/wo": "mlp.down_proj"}
GATES = {"MoeBlock_0/gate": "block_sparse_moe.gate", "moe_block/gate": "mlp.gate"}
EXPERTS = {  # [E, L, in, out]
    **{f"MoeBlock_0/{mine}": f"block_sparse_moe.experts.{{}}.{w}" for mine, w in (("wi_0", "w1"), ("wi_1", "w3"))},
    "MoeBlock_0/wo": "block_sparse_moe.experts.{}.w2",
    "moe_block/wi_0": "mlp.experts.{}.gate_proj",
    "moe_block/wi_1": "mlp.experts.{}.up_proj",
    "moe_block/wo": "mlp.experts.{}.down_proj",
}


class OrbaxMaxTextSource(DirectorySource):
    """A folder with MaxText's checkpoint, `config.json` and a tokenizer as a `CheckpointSource`.

    Raises UserError for a family whose layout in MaxText is not known here, and for arrays without a place.
    """

    def __init__(self, path: Path, name: str):
        super().__init__(path, name)
        family = self.hf_config.get("model_type")
        if family not in DIVIDED_QUERIES:
            raise unknown(f"{self.where}: model type of a checkpoint of MaxText", str(family), DIVIDED_QUERIES)
        arrays = open_arrays(checkpoint_folder(path))
        self.stored = {name: stored_tensor(*part) for name, part in _parts(self.where, arrays, self.hf_config)}
        check_sizes(self.where, self.hf_config, self.stored)

    def tensors(self, wanted: Sequence[str]) -> dict[str, StoredTensor]:
        """All tensors under their Hugging Face names."""
        del wanted
        return self.stored


def is_maxtext(path: Path) -> bool:
    """Whether a folder with a config holds an Orbax checkpoint."""
    return bool(_checkpoints(path))


def checkpoint_folder(path: Path) -> Path:
    """The one Orbax checkpoint in `path`: the folder itself, its `items`, or those of its one step.

    Raises UserError where it holds several steps.
    """
    found = _checkpoints(path)
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} checkpoints, such as {found[-1]}: leave one of them in the folder")
    return found[0]


def _checkpoints(path: Path) -> list[Path]:
    try:
        places = [path, path / "items", *sorted(path.iterdir()), *sorted(path.glob("*/items"))]
        return list(dict.fromkeys(place for place in places if place.is_dir() and is_orbax(place)))
    except OSError:
        return []


class _Part(NamedTuple):
    """A tensor: its array, the part of it in Hugging Face's layout, and what changes its values and not its shape."""

    array: StoredArray
    change: Change
    finish: Change = lambda x: x


def _parts(where: str, arrays: Mapping[str, StoredArray], hf_config: Mapping[str, Any]) -> Iterator[tuple[str, _Part]]:
    skipped = []
    for path, array in arrays.items():
        name = re.sub(r"^(params/)+", "", path)
        match = LAYER.fullmatch(name)
        if name == path:
            skipped.append(path)
        elif name in OUTSIDE:
            yield f"{OUTSIDE[name]}.weight", _Part(array, functools.partial(_outside, name, hf_config))
        elif match:
            yield from _of_layers(where, path, match, array, hf_config)
        else:
            raise UserError(f"{where}: array {path!r} has no place in this model")
    if skipped:
        count = plural(len(skipped), "array")
        logging.info("%s: the parameters are read alone; %s skipped, such as %s", where, count, skipped[0])


def _outside(name: str, hf_config: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """Without the rows of the vocabulary that MaxText pads it with."""
    x = x.T if name.endswith("kernel") else x
    return x if x.ndim == 1 else x[: hf_config["vocab_size"]]


def _of_layers(
    where: str, path: str, match: re.Match[str], array: StoredArray, hf_config: Mapping[str, Any]
) -> Iterator[tuple[str, _Part]]:
    """The tensors of one array of one layer, or of all of them."""
    inner = re.sub(r"/(kernel|scale)$", "", match[2])
    known = {*NORMS, *IN_HEADS, "self_attention/out", *MLP, *GATES, *EXPERTS}
    rank = {**dict.fromkeys(NORMS, 1), **dict.fromkeys(IN_HEADS, 3), "self_attention/out": 3}
    rank |= {**dict.fromkeys([*MLP, *GATES], 2), **dict.fromkeys(EXPERTS, 3)}
    if inner not in known or len(array.shape) != rank[inner] + (match[1] is None):
        raise UserError(f"{where}: array {path!r} of shape {array.shape} has no place in this model")
    for i in range(array.shape[1]) if match[1] is None else (int(match[1]),):
        layer = functools.partial(_layer, i if match[1] is None else None)
        for name, change, finish in _made(inner, array, hf_config):
            yield f"model.layers.{i}.{name}.weight", _Part(array, functools.partial(_then, layer, change), finish)


def _layer(i: int | None, x: np.ndarray) -> np.ndarray:
    return x if i is None else x[:, i]


def _then(first: Change, second: Change, x: np.ndarray) -> np.ndarray:
    return second(first(x))


def _made(inner: str, array: StoredArray, hf_config: Mapping[str, Any]) -> Iterator[tuple[str, Change, Change]]:
    """`(name, change, finish)` of each tensor of one layer's part of an array."""
    same: Change = lambda x: x  # noqa: E731
    if inner in EXPERTS:
        for e in range(array.shape[0]):
            yield EXPERTS[inner].format(e), lambda x, e=e: x[e].T, same  # type: ignore[misc]
    elif inner in IN_HEADS:
        finish = functools.partial(_finished, inner, array.shape[-1], hf_config)
        yield IN_HEADS[inner], lambda x: x.reshape(len(x), -1).T, finish
    elif inner == "self_attention/out":
        yield "self_attn.o_proj", lambda x: x.reshape(-1, x.shape[-1]).T, same
    else:
        yield {**NORMS, **MLP, **GATES}[inner], np.transpose, same


def _finished(inner: str, head_dim: int, hf_config: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """A projection `[N H, D]` with its rows in Hugging Face's order, and queries that are not divided."""
    if inner != "self_attention/value" and _neighbours(hf_config):
        heads = x.reshape(-1, head_dim, x.shape[-1])
        x = np.concatenate([heads[:, ::2], heads[:, 1::2]], axis=1).reshape(x.shape)
    if inner == "self_attention/query" and DIVIDED_QUERIES[hf_config["model_type"]]:
        x = (x.astype(np.float32) * np.float32(head_dim**0.5)).astype(x.dtype)
    return x


def _neighbours(hf_config: Mapping[str, Any]) -> bool:
    """Whether MaxText rotates neighbours: with the rope of Llama 3.1."""
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    return (rope.get("rope_type") or rope.get("type")) == "llama3"
