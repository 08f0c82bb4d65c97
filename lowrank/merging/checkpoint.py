"""A Hugging Face checkpoint as merging reads it: whole tensors in float32, one at a time, and its layers."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.core.errors import UserError
from lowrank.merging.model_spec import ModelSpec
from lowrank.pretrained import hf_files
from lowrank.pretrained.families import family_of
from lowrank.pretrained.resolve import resolve_checkpoint
from lowrank.pretrained.tensor_reader import StoredTensor, check_finite

CHUNK = 1 << 16  # entries that are read at once
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The tensors that a loader makes itself; `attn.c_attn.bias` is none of them.
BUFFERS = r"(.*\.)?(position_ids|rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)"
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
Change = Callable[[str, np.ndarray], np.ndarray]  # (name, tensor) -> the tensor with an adapter, or of a vocabulary


class Checkpoint:
    """The tensors of one model. Only headers are read until `read` is called."""

    def __init__(self, spec: ModelSpec):
        """Raises UserError for a model that cannot be resolved, or that holds codes; those of a GGUF file are read."""
        source = resolve_checkpoint(spec.path, revision=spec.revision)
        self.spec, self.name, self.source, self.folder = spec, source.name, source, Path(source.where)
        self.hf_config = dict(source.hf_config)
        self.tensors = {name: tensor for name, tensor in self._open().items() if not re.fullmatch(BUFFERS, name)}
        for name, tensor in self.tensors.items():
            if not tensor.readable:
                raise UserError(
                    f"{spec}: tensor {name!r} is stored as {tensor.dtype}: merge models that are not quantized"
                )
        self.changes: list[Change] = []
        self.prefix, self.depth = _layers(self.hf_config, self.tensors)
        if self.tied and (heads := [n for n in self.tensors if n.endswith("lm_head.weight")]):
            del self.tensors[heads[0]]  # a copy, which loaders ignore

    def _open(self) -> dict[str, StoredTensor]:
        """All tensors as they are stored; those of a GGUF file under their Hugging Face names."""
        if self.folder.is_dir():
            return hf_files.open_directory(self.folder)
        family, config = family_of(self.hf_config), hf_files.parse_config(self.source.where, self.hf_config)
        tensors = self.source.tensors([name for tensor in family.tensors(config) for name in tensor.names])
        if flipped := [name for name, tensor in tensors.items() if tensor.flipped]:
            raise UserError(
                f"{self.spec}: {flipped[0]!r} is transposed in a GGUF file: convert it to safetensors first"
            )
        return tensors

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        declared = self.hf_config.get("tie_word_embeddings")
        causal = any("ForCausalLM" in a or "LMHead" in a for a in self.hf_config.get("architectures") or ())
        return bool(declared) or (declared is None and causal and "lm_head.weight" not in self.tensors)

    @property
    def dtype(self) -> str:
        """The dtype of its largest tensor."""
        largest = max(self.tensors.values(), key=lambda t: np.prod(t.shape, dtype=np.int64))
        return DTYPE_NAMES.get(largest.dtype, "float32")  # float32 for the codes of a GGUF file

    def layer_name(self, layer: int, rest: str) -> str:
        """The name of a tensor of a layer."""
        return f"{self.prefix}{layer}.{rest}"

    def split_name(self, name: str) -> tuple[int | None, str]:
        """`(layer, rest of the name)`, or `(None, name)` for a tensor outside of the layers."""
        if self.prefix and name.startswith(self.prefix):
            layer, _, rest = name.removeprefix(self.prefix).partition(".")
            if layer.isdigit():
                return int(layer), rest
        return None, name

    def read(self, name: str, wide: bool = False) -> np.ndarray:
        """A tensor in float32, or float64 if `wide`, with the model's changes. Raises UserError for NaN."""
        tensor = self.tensors[name]
        values = read_tensor(
            f"{self.spec}: {name}", tensor, np.float64 if wide or tensor.dtype == "F64" else np.float32
        )
        for change in self.changes:
            values = change(name, values)
        return values

    def fingerprint(self) -> str:
        """A hash of the names, shapes and values of all tensors, equal for equal weights wherever they lie."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
            for start, stop in _spans(tensor):
                digest.update(np.ascontiguousarray(tensor.read(start, stop)).view(np.uint8).data)
        return digest.hexdigest()


def read_tensor(name: str, tensor: StoredTensor, dtype: Any) -> np.ndarray:
    """The whole tensor, read and converted a few rows at a time."""
    if not tensor.shape:
        return check_finite(name, tensor.read(0, 1)).reshape(()).astype(dtype)
    values = np.empty(tensor.shape, dtype)
    for start, stop in _spans(tensor):
        values[start:stop] = check_finite(name, tensor.read(start, stop))
    return values


def _spans(tensor: StoredTensor) -> list[tuple[int, int]]:
    if not tensor.shape:
        return [(0, 1)]
    rows, width = tensor.shape[0], int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, CHUNK // max(1, width))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _layers(hf_config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> tuple[str, int]:
    """`(what comes before a layer's number in the names, number of layers)`; `("", 0)` for a model without layers."""
    depth = next((hf_config[key] for key in LAYER_COUNTS if hf_config.get(key)), 0)
    counts: dict[str, set[int]] = {}
    for name in tensors:
        if match := re.match(r"((?:[a-zA-Z_]\w*\.)*?)(\d+)\.", name):
            counts.setdefault(match[1], set()).add(int(match[2]))
    fitting = [prefix for prefix, layers in counts.items() if layers == set(range(depth))]
    return (min(fitting, key=len), depth) if fitting else ("", 0)
