"""A full Hugging Face checkpoint of a model: config.json, safetensors and the tokenizer's files."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lowrank.core import files, tree
from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.paths import PathLike, as_local_path
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_stored
from lowrank.models import context
from lowrank.pretrained import companions, hf_context, quantized_checkpoint
from lowrank.pretrained.families import FAMILIES
from lowrank.pretrained.hf_files import INDEX, SINGLE
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.load import PARAM_DTYPES, Pretrained

SHARD_BYTES = 5_000_000_000
RUNTIME = (
    "dtype",
    "remat",
    "remat_names",
    "unroll",
    "attention",
    "top_layers",
    "num_labels",
    "biases",
)  # fields that config.json does not record, or that the weights determine
BIASES = ("attention_bias", "mlp_bias")  # the keys of `biases` in config.json, in the families that have them


def export(
    params: PyTree,
    base: Pretrained,
    directory: PathLike,
    *,
    dtype: str = "float32",
    labels: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    scheme: Mapping[str, Any] | None = None,
    made: str = "Weights",
) -> Path:
    """Writes `params`, plain arrays in the tree of `base`, so that transformers loads them; every process must call it.

    With a `scheme`, the group that quantized them, `params` may hold codes, which only `pretrained.load` reads
    (`lowrank.pretrained.quantized_checkpoint`). `dtype` is the stored dtype of the other tensors; `labels` name the
    classes; a file holds at most `shard_bytes`; `made` is the method in the words of the model card. The
    directory is written beside its place and renamed. Raises UserError for a directory that is not empty, for a disk
    without room, and for a leaf or an option that a Hugging Face checkpoint cannot hold.
    """
    directory = as_local_path(directory)
    if dtype not in PARAM_DTYPES:
        raise unknown("dtype", dtype, PARAM_DTYPES)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory: name another one")
    config = _hf_config(base, dtype, labels)
    leaves = dict(tree.named_leaves(params, is_stored if scheme else None))
    tensors = _check_leaves(leaves, base)
    if scheme:
        config["quantization_config"] = quantized_checkpoint.quantization_config(scheme, leaves)
        tensors, leaves = quantized_checkpoint.expand_forms(tensors, leaves)
    shards = fill_files(_parts(tensors), lambda part: _bytes(part, leaves, dtype), shard_bytes)
    files.require_space(directory, sum(_bytes(part, leaves, dtype) for shard in shards for part in shard))
    if jax.process_index():
        for shard in shards:
            _arrays(shard, leaves, dtype)
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with files.scratch_beside(directory, folder=True) as scratch:
            _write_shards(scratch, shards, leaves, dtype)
            base.tokenizer.save(scratch)
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            companions.write(base, scratch, directory.name, made)
            files.sync_folder(scratch)
            scratch.rename(directory)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {directory}: {e}") from None
    return directory


Item = TypeVar("Item")
Part = tuple[str, Tensor, tuple[int, ...]]  # a tensor's name, its leaf, and its index in the leaf


def _hf_config(base: Pretrained, dtype: str, labels: Sequence[str]) -> dict[str, Any]:
    family, config = FAMILIES[base.family], context.as_own(base.config)
    unrecorded = RUNTIME if config.num_labels else (*RUNTIME, "pooling")
    ours = family.hf_config(config)
    added = {name: ours[name] for name in BIASES if name in ours} if config.biases else {}
    recorded = {**hf_context.extended_config(family, base.config, base.hf_config), **added}
    source = family.config(recorded)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in unrecorded and value != getattr(source, field.name):
            raise UserError(f"model.{field.name}={value!r} cannot be written to a {base.family} config.json")
    if labels and len(labels) != config.num_labels:
        names, classes = plural(len(labels), "label"), plural(config.num_labels, "class")
        raise UserError(f"{names} cannot name the model's {classes}: give one per class")
    merged = {**recorded, "architectures": ours["architectures"], "torch_dtype": dtype}
    merged.setdefault("pad_token_id", base.tokenizer.pad_id)
    if config.num_labels:
        names = list(labels) or _recorded_labels(base.hf_config, config.num_labels)
        merged |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    merged.pop("dtype", None)
    merged.pop("quantization_config", None)
    return merged


def _recorded_labels(hf_config: Mapping[str, Any], count: int) -> list[str]:
    """The names of the classes in a `config.json`, in the order of their ids; `LABEL_0`, ... if it has others."""
    recorded = hf_config.get("id2label")
    found = {str(i): name for i, name in recorded.items()} if isinstance(recorded, Mapping) else {}
    names = [found.get(str(i)) for i in range(count)]
    usable = len(found) == count and all(isinstance(name, str) for name in names) and len({*names}) == count
    return names if usable else [f"LABEL_{i}" for i in range(count)]


def _check_leaves(leaves: Mapping[str, Any], base: Pretrained) -> list[Tensor]:
    tensors = FAMILIES[base.family].tensors(base.config)
    names, places = set(leaves), {t.leaf for t in tensors}
    for name in sorted(names ^ places):
        missing = f"leaf {name!r} is missing" if name in places else f"leaf {name!r} has no place in a checkpoint"
        raise UserError(f"cannot export {base.name}: {missing}")
    return tensors


def _bytes(part: Part, leaves: Mapping[str, Any], dtype: str) -> int:
    """The bytes that a tensor takes in a file."""
    leaf = leaves[part[1].leaf]
    return leaf.size * (leaf.dtype if part[1].dtype else jax.numpy.dtype(dtype)).itemsize // len(part[1].places)


def fill_files(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """Items in their order, in as few files of at most `limit` bytes; a larger item has a file of its own."""
    filled: list[list[Item]] = [[]]
    space = limit
    for item in items:
        if size(item) > space and filled[-1]:
            filled.append([])
            space = limit
        filled[-1].append(item)
        space -= size(item)
    return filled


def _parts(tensors: Sequence[Tensor]) -> Iterator[Part]:
    for tensor in tensors:
        for place, name in zip(tensor.places, tensor.names, strict=True):
            yield name, tensor, place


def _arrays(shard: Sequence[Part], leaves: Mapping[str, Any], dtype: str) -> dict[str, np.ndarray]:
    """The tensors of one file, on the host."""
    arrays = {}
    for name, tensor, place in shard:
        leaf = leaves[tensor.leaf][place]
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        kind = array.dtype if tensor.dtype else jax.numpy.dtype(dtype)
        arrays[name] = np.asarray(array.T if tensor.transpose else array, kind, order="C")
    return arrays


def _write_shards(directory: Path, shards: Sequence[Sequence[Part]], leaves: Mapping[str, Any], dtype: str) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = _arrays(shard, leaves, dtype)
        save_file(arrays, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
        total += sum(a.nbytes for a in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
