"""The adapter of a run on disk: in the PEFT format where PEFT has one for it, else the trained leaves by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from lowrank.adapters import peft
from lowrank.core import files, paths, schema, tree
from lowrank.core.errors import UserError, nearest
from lowrank.core.json_types import TrainedLeaves
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_stored, is_weight
from lowrank.models.adapter_options import AdapterOptions
from lowrank.weights.dora import DoRA
from lowrank.weights.lora import LoRA

# The fields of the model's config that an adapter records -> their defaults.
OPTIONS = {f.name: f.default for f in dataclasses.fields(AdapterOptions)}
ARRAYS, ABOUT = "trained.safetensors", "trained.json"
METHOD = "method.json"  # beside an adapter in the PEFT format, which does not say its method in full
READ_BACK = (LoRA, DoRA)  # the forms that the PEFT format gives back as they were
# The fields of Pretrained that say how the base was read -> the files that hold them.
BASES = {"quantized": "quantized_base.json", "upcycled": "upcycled_base.json"}


def save(
    params: PyTree,
    base: Any,
    directory: PathLike,
    *,
    mask: PyTree,
    method: Mapping[str, Any],
    original: PyTree | None = None,
    base_hash: str = "",
    exact: tuple[PyTree, PyTree] | None = None,
) -> str:
    """Writes the adapter in `params`, on the base `base`; returns the format in words. Every process must call it.

    An adapter of rewritten weights is written in the PEFT format where that format has a place for it. Every other
    adapter is written as `trained.safetensors`, `{leaf name: array}`, and `trained.json`. If the base was quantized or
    upcycled as it was read, the files of BASES hold the options of that; PEFT ignores these files.

    Args:
      params: the trained parameters, as `methods.exported_leaves` returns them.
      base: the base that the adapter was trained on.
      directory: the folder of the adapter.
      mask: bools over `params`, true for the leaves to save.
      method: the config group of the method.
      original: the parameters before the method's rules, where these changed a base.
      base_hash: the `pretrained.fingerprint` of the base.
      exact: the parameters as a run trains them, and the mask of their leaves that make it up. They are written by name
        beside the PEFT format where that does not give them back, so that a run can train the adapter further.
    """
    for field, file in BASES.items():
        if getattr(base, field, None) and jax.process_index() == 0:
            files.write_json(as_path(directory) / file, dict(getattr(base, field)))
    trained = [name for name, learns in tree.named_leaves(mask) if learns]
    why = "no weight was rewritten"
    rewritten = (is_weight(w) and not is_stored(w) for w in jax.tree.leaves(params, is_leaf=is_weight))
    found = {name: getattr(base.config, name) for name in OPTIONS}
    options = {name: value for name, value in found.items() if value != OPTIONS[name]}
    about = {"base": base.name, "base_hash": base_hash, "model": options, "method": dict(method)}
    if stretched := [name for name in ("context", "position_factor") if name in options]:
        why = f"PEFT does not hold model.{stretched[0]}"
    elif peft.can_write(params) or any(rewritten):
        try:
            peft.save(params, base, directory, trained=trained, method=method, original=original)
            _save_method(about, params if original is None else None, exact, as_path(directory))
            return "adapter in the PEFT format"
        except UserError as e:
            why = str(e)
    _save_leaves(params, trained, as_path(directory))
    if jax.process_index() == 0:
        files.write_json(as_path(directory) / ABOUT, {**about, "not_peft": why, "leaves": trained})
    return "trained leaves by name"


def _save_method(
    about: Mapping[str, Any], params: PyTree | None, exact: tuple[PyTree, PyTree] | None, directory: AnyPath
) -> None:
    """Writes `method.json`, and the `exact` leaves unless the PEFT format gives back `params`; None: it does not."""
    forms = {type(w) for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w) and not is_stored(w)}
    if exact and (params is not exact[0] or not forms <= set(READ_BACK)):
        _save_leaves(exact[0], [name for name, learns in tree.named_leaves(exact[1]) if learns], directory)
    if jax.process_index() == 0:
        files.write_json(directory / METHOD, about)


def base_of(directory: PathLike) -> dict[str, Any]:
    """The keywords of `pretrained.load` for the base of an adapter that was quantized or upcycled; empty otherwise."""
    found = {}
    for field, file in BASES.items():
        path = as_path(directory) / file
        if paths.exists(path):
            found[field] = schema.decode(path)
    dtype = found.get("quantized", {}).pop("param_dtype", None)
    return found | ({"param_dtype": dtype} if dtype else {})


def load_leaves(directory: PathLike, params: PyTree, base_name: str) -> PyTree:
    """`params`, to which the same method was attached, with the leaves that `save` wrote by name.

    Raises UserError when the files cannot be read, when the adapter belongs to another base, and when a leaf differs
    from `params` in name or shape.
    """
    about = schema.decode(as_path(directory) / ABOUT, TrainedLeaves)
    arrays = _read_arrays(as_path(directory))
    if about["base"] != base_name:
        raise UserError(f"adapter {directory} was trained on {about['base']!r}, not on {base_name!r}")
    return _put(directory, arrays, params)


def put_leaves(directory: PathLike, params: PyTree) -> PyTree:
    """As `load_leaves`, of a base that has been compared already."""
    return _put(directory, _read_arrays(as_path(directory)), params)


def _read_arrays(directory: AnyPath) -> dict[str, np.ndarray]:
    try:
        with paths.local_file(directory / ARRAYS) as file:
            return load_file(file)
    except (OSError, ValueError, TypeError, SafetensorError) as e:
        raise UserError(f"adapter {directory} cannot be read: {e}") from None


def _put(directory: PathLike, arrays: Mapping[str, np.ndarray], params: PyTree) -> PyTree:
    shapes = {name: leaf.shape for name, leaf in tree.named_leaves(params)}
    for name, array in arrays.items():
        if name not in shapes:
            raise UserError(f"leaf {name!r} of {directory} is not in the model{nearest(name, shapes)}")
        if array.shape != shapes[name]:
            raise UserError(f"leaf {name!r} of {directory} has shape {array.shape}, the model needs {shapes[name]}")
    put = lambda name, leaf: jax.device_put(arrays[name].astype(leaf.dtype), leaf.sharding)  # noqa: E731
    return tree.map_named(lambda name, leaf: put(name, leaf) if name in arrays else leaf, params)


def _save_leaves(params: PyTree, trained: list[str], directory: AnyPath) -> None:
    leaves = dict(tree.named_leaves(params))
    arrays = {name: _on_host(leaves[name]) for name in trained}
    if jax.process_index() == 0:
        files.write_bytes(directory / ARRAYS, to_safetensors(arrays))


def _on_host(leaf: jax.Array) -> np.ndarray:
    whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(whole, order="C")
