"""The adapter that a run starts from: it is trained further, or merged into the base, on which a method begins anew."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lowrank import methods, pretrained
from lowrank.adapters import export, load, saved_adapter
from lowrank.adapters.saved_adapter import SavedAdapter
from lowrank.core import files, multihost, tree, weight
from lowrank.core.errors import UserError
from lowrank.core.paths import AnyPath, exists, in_bucket
from lowrank.core.typing import PyTree
from lowrank.methods.agreement import agreed_group, check_same_leaves, differing
from lowrank.pretrained import quantized_checkpoint
from lowrank.pretrained.families import FAMILIES
from lowrank.pretrained.fingerprint import fingerprint
from lowrank.pretrained.resolve import resolve_checkpoint
from lowrank.training.config import CARRY, MERGE, ModelConfig, RunConfig
from lowrank.training.run import Run
from lowrank.weights.quantized.schemes import scheme_group

MERGED_BASE = "merged_base"  # the folder in that of a run with the base that an adapter was merged into
# Options of the model that add to it what no checkpoint holds.
UNMERGED = ("num_prompt", "prefix_length", "adapter_width", "routed_width")


def read_start(top: RunConfig, model: ModelConfig) -> tuple[RunConfig, SavedAdapter | None]:
    """The config with the method of the adapter that it names, and that adapter; no weights are read.

    Raises UserError for an adapter of another base, method or setting.
    """
    if not model.adapter:
        return top, None
    saved = saved_adapter.read_adapter(model.adapter, model.name)
    if model.start == MERGE:
        if unmerged := [key for key in UNMERGED if saved.model.get(key)]:
            raise UserError(
                f"{saved} has model.{unmerged[0]}={saved.model[unmerged[0]]}, which no base can hold: leave "
                "model.start out, which trains it further"
            )
        return top, saved
    if saved.ours:
        source = resolve_checkpoint(model.name)
        scheme = scheme_group(model.quantize) or quantized_checkpoint.stored_scheme(source.where, source.hf_config)
        wanted = {"quantized": scheme or {}, "upcycled": dict(model.upcycle or {})}
        for field, key in (("quantized", "quantize"), ("upcycled", "upcycle")):
            theirs = saved.read_as.get(field, {})
            if files.to_json(wanted[field]) != files.to_json(theirs):
                raise UserError(
                    f"model.{key}={wanted[field] or None} in the config, and the base of {saved} was read with "
                    f"{theirs or None}: set it to that, or model.start=merge"
                )
    return dataclasses.replace(top, method=agreed_group(top.method, saved.method, str(saved), saved.known)), saved


def check_start(saved: SavedAdapter, given: Mapping[str, Any], shapes: PyTree, base: PyTree, config: Any) -> None:
    """Raises UserError where a run that trains `saved` further has other leaves or options of the model.

    `given` is the group of the run's method, `shapes` are the adapted parameters that it makes of `base`, and `config`
    is that of the model.
    """
    for key, value in saved.model.items():
        if files.to_json(getattr(config, key)) != files.to_json(value):
            raise UserError(
                f"the model has {key}={getattr(config, key)!r} by the config, and {saved} was trained with {value!r}: "
                f"set model.{key} to that, or model.start=merge"
            )
    if saved.known and differing(given, saved.method):
        method = methods.build_method(saved.method)
        own = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), base)
        check_same_leaves(_shapes(shapes), _shapes(own), str(saved))


def check_continues(run: Run, before: Run, where: str) -> None:
    """Raises UserError where `run` has not every leaf that `before` trains, in its shape; `where` names the adapter."""
    kept = {name for name, learns in tree.named_leaves(before.mask) if learns} | before.changing
    ours, theirs = (_shapes(r.shapes) for r in (run, before))
    own = {name: theirs[name] for name in theirs if name in kept}
    check_same_leaves({name: ours[name] for name in own if name in ours}, own, where)


def check_mergeable(run: Run, where: str) -> None:
    """Raises UserError if the adapter that a run trains cannot be merged; `where` names the run."""

    def merged(params: PyTree) -> PyTree:
        bound = run.method.bind(params, None, None) if run.method.bind else params
        return weight.merge({name: part for name, part in bound.items() if name != methods.SHARED})

    try:
        names = tree.leaf_names(jax.eval_shape(merged, run.shapes))
    except UserError as e:
        raise UserError(f"the adapter of {where} cannot be merged: {e}") from None
    family = FAMILIES[resolve_checkpoint(run.model.name).hf_config["model_type"]]
    places = {tensor.leaf for tensor in family.tensors(run.network.config)}
    for name in names:
        if name not in places:
            raise UserError(
                f"the adapter of {where} cannot be merged, as its leaf {name} has no place in a checkpoint: train it "
                "further by start=carry, or choose another method there"
            )


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in tree.named_leaves(params)}


def with_merged_base(run: Run, folder: AnyPath) -> Run:
    """A run that starts from a merge on the merged base, which is written into its `folder` unless it is there already.

    Other runs stay as they are. Raises UserError for an adapter that cannot be merged, and for a folder in a bucket.
    """
    if run.model.start != MERGE:
        return run
    path = folder / MERGED_BASE
    with multihost.agreed():
        if jax.process_index() == 0:
            _merge(run, path)
    model = dataclasses.replace(run.model, name=str(path), adapter="", start=CARRY)
    _, _, shapes = pretrained.describe(str(path), run.options, param_dtype=model.param_dtype)
    if shapes["embed"]["embedding"].shape[0] != run.network.config.vocab_size:
        assert run.adapter is not None
        raise UserError(
            f"{run.adapter} changes the vocabulary of {run.model.name}: merge it first, by python -m launch.merge "
            f"--adapter={run.adapter.folder} --base={run.model.name} --output=DIR, and set model.name=DIR"
        )
    return dataclasses.replace(run, model=model, adapter=None)


def _merge(run: Run, path: AnyPath) -> None:
    """Writes the merged base, unless it is there already; beside it is a file that says what it was made of."""
    assert run.adapter is not None
    if in_bucket(path):
        raise UserError(f"model.start=merge writes a checkpoint to {path}, which must be local: name a local workdir")
    dtype, about = run.model.param_dtype, path.with_suffix(".json")
    made_of = {"base": fingerprint(run.model.name), "adapter": run.adapter.digest, "dtype": dtype}
    if exists(path) and files.read_json(about) != made_of:
        raise UserError(f"{path} was made of another base or adapter: put those back, or choose another workdir")
    if not exists(path):
        files.write_json(about, made_of)
        model = load.load_adapted(run.adapter.folder, run.model.name, any_base=True, param_dtype=dtype)
        export.merge_to_hf(model.params, model, path, dtype=dtype)


def digest(run: Run) -> str:
    """The hash of the adapter that a run trains further, empty where it starts anew."""
    return run.adapter.digest if run.adapter else ""


def check_digest(run: Run, recorded: str, folder: AnyPath) -> None:
    """Raises UserError if the adapter that a run in `folder` started from is not the one of its checkpoint."""
    if digest(run) != recorded:
        raise UserError(
            f"{run.adapter} has changed since the run in {folder} started from it: put it back, or choose another "
            "workdir"
        )


def base_name(folder: AnyPath, model: str) -> str:
    """The base of the run in `folder`, whose config names `model`: the merged one, where the run made it."""
    path = folder / MERGED_BASE
    return str(path) if exists(path) else model
