"""Reading a PEFT adapter: its weights are attached to the parameters of a base."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import config as configs
from lowrank.adapters.peft import embeddings, initial, match, tensors
from lowrank.adapters.peft.forms import Layer, PeftForm, Settings
from lowrank.adapters.peft.modules import HEADS, TABLE, Base, Module, Place, base_modules, check_conv1d
from lowrank.core import tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight
from lowrank.weights.lora import RESIDUAL, LoRA

PER_EXPERT = re.compile(r"\.experts\.\d+\.")  # experts that are modules, as in transformers 4


class AdapterDescription(NamedTuple):
    """The summary of an adapter: `model` are the options with which its base must be loaded.

    `revision` is that of the base, where it comes from a hub; `residual_base` is the folder of a base inside the
    adapter's, which the adapter's init has changed.
    """

    peft_type: str
    base: str | None
    model: dict[str, Any]
    revision: str | None = None
    residual_base: str | None = None


def describe_adapter(directory: str | os.PathLike[str]) -> AdapterDescription:
    """What the adapter in `directory` is for, without its tensors. Raises UserError as `peft.load` does."""
    config, _ = configs.read_config(directory)
    shapes = tensors.read_shapes(directory)
    heads = [f"{tensors.PREFIX}{name}.weight" for name in configs.HEAD_MODULES]
    labels = [shapes[name][0] for name in heads if name in shapes]
    options = {"num_labels": labels[0]} if labels else {}
    own_base = initial.residual_base(config, directory)
    return AdapterDescription(
        config["peft_type"], config["base_model_name_or_path"], options, config["revision"] or None, own_base
    )


def attach(
    config: Mapping[str, Any],
    form: PeftForm,
    found: Mapping[str, np.ndarray],
    params: PyTree,
    base: Base,
    directory: str | os.PathLike[str],
) -> PyTree:
    """`params`, the plain tree of `base`, with the adapter of the JSON `config` and the tensors `found`.

    Layers without an adapter have rank 0 in their stack. Biases and whole modules of the adapter replace those in
    `params`. `directory` is for error texts. Raises UserError for tensors that are missing, unexpected or misshapen.
    """
    leaves = dict(tree.named_leaves(params, is_weight))
    known = base_modules(base, per_expert=any(map(PER_EXPERT.search, found)))
    targets, others = find_places(config, form, known)
    others |= embeddings.unlisted(known, targets, found)
    settings = {path: form.settings(on_module(config, module), path) for path, module in targets.items()}
    sizes = [leaves[module.weight.leaf].shape[-2:] for module in targets.values()]
    expected = form.root.shapes(config, sizes) if form.root else {}
    for path, module in targets.items():
        expected |= _shapes(form, module, settings[path], leaves[module.weight.leaf].shape)
    found = {key: x for key, x in found.items() if not _is_copy(key, others)}
    own = _own_bases(targets, found)
    changed = [key for key, place in own.items() if place.leaf != TABLE]
    if changed and config.get("init_lora_weights") in RESIDUAL:
        raise UserError(f"the adapter in {directory} holds a base weight that its init changed: {changed[0]}")
    others |= own
    expected |= {key: _disk_shape(leaves[place.leaf].shape, place) for key, place in others.items()}
    tensors.check_shapes(directory, found, expected)
    leaves |= _replaced(others, found, leaves)
    root = form.root.read(config, sizes, found) if form.root else {}
    leaves |= _grown(form, targets, settings, found, root, leaves)
    return tree.map_named(lambda name, _: leaves[name], params, is_leaf=is_weight)


def find_places(
    config: Mapping[str, Any], form: PeftForm, known: Mapping[str, Module]
) -> tuple[dict[str, Module], dict[str, Place]]:
    """The adapted modules by path, and the places of the whole tensors of the adapter by key."""
    linear = [path for path, module in known.items() if module.linear]
    paths = linear if is_all(config["target_modules"]) else list(known)
    targets = match.find_targets(config, paths, heads=[p for p in linear if p.split(".")[0] in HEADS])
    for path in targets:
        if not known[path].takes(form):
            kinds = "linear layers and the token embedding" if form.on_embedding else "linear layers only"
            raise UserError(f"the adapter targets {path}; {form.peft_type} is supported on {kinds}")
        check_conv1d(form, known[path])
        if PER_EXPERT.search(path) and form.kind is not LoRA:
            raise UserError(f"the adapter targets {path}; on experts plain LoRA alone is supported")
    others = _saved(config, known)
    mode = config.get("bias", "none")
    if mode not in ("none", "all", form.own_bias):
        raise unknown("bias in adapter_config.json:", str(mode), ("none", "all", form.own_bias))
    for path, module in known.items():
        if module.bias and (mode == "all" or (mode == form.own_bias and path in targets)):
            inner = ".base_layer" if path in targets else ""
            others.setdefault(f"{tensors.PREFIX}{path}{inner}.bias", module.bias)
    return {path: known[path] for path in targets}, others


def is_all(names: Any) -> bool:
    """Whether `target_modules` stands for every linear layer."""
    return isinstance(names, str) and names.lower() == match.ALL_LINEAR


def _saved(config: Mapping[str, Any], known: Mapping[str, Module]) -> dict[str, Place]:
    """The tensors of `modules_to_save` by key. PEFT always lists both possible names of a classifier."""
    saved: dict[str, Place] = {}
    for name in config["modules_to_save"] or ():
        chosen = [module for path, module in known.items() if match.is_inside([name], path)]
        if not chosen and name not in HEADS:
            raise unknown("module in modules_to_save:", name, {path.rpartition(".")[2] for path in known})
        for module in chosen:
            saved |= {f"{tensors.PREFIX}{module.path}.{kind}": place for kind, place in module.places().items()}
    return saved


def _is_copy(key: str, others: Mapping[str, Place]) -> bool:
    """PEFT's `bias='all'` also writes the biases of a saved module under the names of its wrapper."""
    plain = re.sub(r"\.(original_module|modules_to_save\.\w+)(?=\.)", "", key)
    return plain != key and plain in others


def _own_bases(targets: Mapping[str, Module], found: Iterable[str]) -> dict[str, Place]:
    """The base weights of adapted heads, which PEFT writes too."""
    keys = {f"{tensors.PREFIX}{path}.base_layer.weight": module.weight for path, module in targets.items()}
    return {key: place for key, place in keys.items() if key in found}


def _shapes(form: PeftForm, module: Module, settings: Settings, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    parts = form.present_parts(*shape[-2:], settings)
    return {module.key(part): on_disk for part, on_disk in parts}


def on_module(config: Mapping[str, Any], module: Module) -> Mapping[str, Any]:
    """The JSON as PEFT obeys it for a module: the inits that change a base leave embeddings as they are."""
    return {**config, initial.KEY: True} if module.embedding else config


def _disk_shape(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    shape = shape if place.layer is None else shape[1:]
    return shape[::-1] if place.transpose else shape


def _grown(
    form: PeftForm,
    targets: Mapping[str, Module],
    settings: Mapping[str, Settings],
    found: Mapping[str, np.ndarray],
    root: Mapping[str, np.ndarray],
    leaves: Mapping[str, Any],
) -> dict[str, Any]:
    """The adapted weights by leaf name; a stack has None for each layer without an adapter."""
    rows: dict[str, list[Layer | None]] = {}
    for path, module in targets.items():
        leaf, layer, _ = module.weight
        size = leaves[leaf].shape[-2:]
        arrays = form.root.module_arrays(root, *size) if form.root else {}
        for part, _ in form.present_parts(*size, settings[path]):
            arrays[part.field] = part.from_disk(found[module.key(part)])
        stack = leaves[leaf].shape[:-2]
        rows.setdefault(leaf, [None] * math.prod(stack))[layer or 0] = Layer(settings[path], arrays)
    return {leaf: form.from_layers(leaves[leaf], row) for leaf, row in rows.items()}


def _replaced(
    others: Mapping[str, Place], found: Mapping[str, np.ndarray], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, place in others.items():
        array = found[key].T if place.transpose else found[key]
        old = changed.get(place.leaf, leaves[place.leaf])
        array = jnp.asarray(array, old.dtype)
        changed[place.leaf] = array if place.layer is None else old.at[place.layer].set(array)
    return changed
