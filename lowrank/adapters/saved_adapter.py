"""An adapter on disk that a run starts from: what it is of, and its leaves as the run's own."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank.adapters import adapter_files, peft
from lowrank.adapters.peft import config as peft_config
from lowrank.adapters.peft import tensors
from lowrank.adapters.resolve import adapter_folder
from lowrank.core import config_schema, paths, schema, tree
from lowrank.core.errors import UserError, nearest
from lowrank.core.json_types import TrainedLeaves
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_stored, is_weight
from lowrank.pretrained import hf_files
from lowrank.pretrained.fingerprint import fingerprint
from lowrank.pretrained.resolve import resolve_checkpoint


class BaseFacts(NamedTuple):
    """A base as `lowrank.adapters.peft` needs it; `folders` are where its files lie."""

    config: Any
    family: str
    name: str
    folders: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter in `folder`, of the `method` group; where that is not `known` in full, the files lack settings.

    `model` are the options of the model's config that it was trained with, and `quantized` is the scheme of its base,
    where it says so. With `has_leaves`, the leaves that a run of the method trains are there by name.
    """

    folder: AnyPath
    base: BaseFacts
    method: Mapping[str, Any]
    known: bool
    has_leaves: bool
    model: Mapping[str, Any]
    read_as: Mapping[str, Any]  # the keywords `quantized` and `upcycled` of `pretrained.load`, empty where it is plain
    ours: bool  # whether a run has written it, and said how its base was read

    def __str__(self) -> str:
        return f"the adapter in {self.folder}"

    @functools.cached_property
    def digest(self) -> str:
        """A hash of its files, by which a run that resumes knows that it started from them."""
        names = (tensors.NAME, peft_config.NAME, adapter_files.ARRAYS)
        found = [self.folder / name for name in names if paths.exists(self.folder / name)]
        return hashlib.sha256(b"".join(hashlib.sha256(paths.read_bytes(path)).digest() for path in found)).hexdigest()


def read_adapter(spec: PathLike, model: str) -> SavedAdapter:
    """The adapter in a folder, or of a hub id `ORG/NAME[@REVISION]`, for the base `model`; no weights are read.

    Raises UserError for an adapter of another base: by the hash of its tensors, where it is recorded or its base lies
    on this machine, else by its name. Raises it too for files that cannot be read.
    """
    folder, source = as_path(adapter_folder(spec)), resolve_checkpoint(model)
    config = hf_files.parse_config(source.where, source.hf_config)
    base = BaseFacts(config, source.hf_config["model_type"], source.name, (source.where,))
    ours = next((name for name in (adapter_files.ABOUT, adapter_files.METHOD) if paths.exists(folder / name)), None)
    read_as = {k: v for k, v in adapter_files.base_of(folder).items() if k in adapter_files.BASES}
    leaves = paths.exists(folder / adapter_files.ARRAYS)
    if ours:
        about = schema.decode(folder / ours, TrainedLeaves)
        _check_hash(folder, about["base"], about.get("base_hash", ""), model, base.name)
        base = base._replace(config=config_schema.replace_fields(config, about["model"], "model"))
        return SavedAdapter(folder, base, about["method"], True, leaves, about["model"], read_as, True)
    described = peft.describe_adapter(folder)
    if described.residual_base is None or described.residual_base != source.where:
        _check_recorded(folder, described.base, model, base.name)
    base = base._replace(config=config_schema.replace_fields(config, described.model, "model"))
    group, known = peft.method_group(folder, base, source.where)
    return SavedAdapter(folder, base, group, known, False, described.model, read_as, False)


def _check_hash(folder: AnyPath, recorded: str, digest: str, model: str, name: str) -> None:
    if not digest:
        peft_config.check_base({"base_model_name_or_path": recorded}, name, folder, any_base=False)
    elif digest != fingerprint(model):
        raise UserError(
            f"the adapter in {folder} was trained on {recorded!r}, whose weights are not those of {model}: their "
            "hashes differ; name its base in model.name"
        )


def _check_recorded(folder: AnyPath, recorded: str | None, model: str, name: str) -> None:
    if recorded and as_path(recorded) != as_path(model) and paths.is_folder(recorded):
        _check_hash(folder, recorded, fingerprint(recorded), model, name)
    else:
        peft_config.check_base({"base_model_name_or_path": recorded}, name, folder, any_base=False)


def carried(saved: SavedAdapter, plain: PyTree, adapted: PyTree, mask: PyTree) -> PyTree:
    """`adapted`, what the method makes of the base's parameters `plain`, with the leaves of the saved adapter.

    `mask` is true for the leaves that the run trains. The bases of forms stay as the method made them, so PiSSA's and
    OLoRA's residuals do. Raises UserError for an adapter with other leaves than the method's.
    """
    if saved.has_leaves:
        return adapter_files.put_leaves(saved.folder, adapted)
    if saved.ours and (wrong := [name for name, w in _forms(adapted) if not isinstance(w, adapter_files.READ_BACK)]):
        raise UserError(f"{saved} lacks {adapter_files.ARRAYS}, without which {wrong[0]} cannot be trained further")
    loaded = peft.load(saved.folder, plain, saved.base, any_base=True, rebased=False)
    ours, theirs, before = (dict(tree.named_leaves(params)) for params in (adapted, loaded, plain))
    learns = dict(tree.named_leaves(mask))
    bases = tuple(f"{name}/base" for name, _ in _forms(adapted))
    scales = {f"{name}/scale" for name, _ in _forms(adapted)}
    _check_leaves(saved, ours, theirs)

    def value(name: str, leaf: jax.Array) -> jax.Array:
        found = theirs[name]
        if name.startswith(bases):
            return leaf
        if name in scales:
            return _same_scale(saved, name, leaf, found)
        if not learns[name] and name in before:
            return _unchanged(saved, name, leaf, found)
        return jax.device_put(jnp.asarray(found, leaf.dtype), leaf.sharding)

    return tree.map_named(value, adapted)


def _forms(params: PyTree) -> list[tuple[str, Any]]:
    named = tree.named_leaves(params, is_weight)
    return [(name, w) for name, w in named if is_weight(w) and not is_stored(w)]


def _check_leaves(saved: SavedAdapter, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name in [*ours, *theirs]:
        shapes = [str(list(x[name].shape)) if name in x else "absent" for x in (ours, theirs)]
        if shapes[0] != shapes[1]:
            near = nearest(name, theirs) if name not in theirs else ""
            raise UserError(
                f"{name} is {shapes[0]} by method.name={saved.method['name']} of the config, and {shapes[1]} in "
                f"{saved.folder}{near}: set the method's options to those of the adapter, or model.start=merge"
            )


def _same_scale(saved: SavedAdapter, name: str, ours: jax.Array, theirs: jax.Array) -> jax.Array:
    if not jnp.allclose(ours, theirs, rtol=1e-5) and not saved.known:
        raise UserError(f"{name} is {ours.ravel()[0]} by method.alpha, and {theirs.ravel()[0]} in {saved.folder}")
    return ours


def _unchanged(saved: SavedAdapter, name: str, ours: jax.Array, theirs: jax.Array) -> jax.Array:
    if theirs is not ours and not jnp.array_equal(ours, jnp.asarray(theirs, ours.dtype)):
        raise UserError(
            f"{saved} changes {name}, which the run's method does not train: add it to method.also_train, or set "
            "model.start=merge"
        )
    return ours
