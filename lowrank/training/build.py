"""A config becomes a checked run: errors in the config are found before a weight is read or computed."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank import data, methods, models, pretrained
from lowrank.adapters.saved_adapter import SavedAdapter
from lowrank.core import config_schema, parameter_summary, sharding, tree
from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.typing import PyTree, Tokenizer
from lowrank.evaluation.evaluator import EvalConfig, Evaluator
from lowrank.methods import Method
from lowrank.objectives import Objective, build_objective
from lowrank.training import optimizer
from lowrank.training.config import CARRY, CheckpointConfig, Group, ModelConfig, RunConfig, with_precision
from lowrank.training.offload import HOST, has_host
from lowrank.training.optimizer import OptimConfig
from lowrank.training.run import Run
from lowrank.training.start import check_start, read_start


def build_run(
    config: Group, devices: Sequence[Any] | None = None, like: Run | None = None, planned: bool = False
) -> Run:
    """The run of a config (a ConfigDict or nested dicts), checked against the model, the data and the mesh.

    `devices` are those of the mesh if they are not on this machine: such a run can only be compiled. `like` is a run on
    the same data, whose loader and scorer are used again. A `planned` run is never started: its model may lack tensors
    and a tokenizer, and without a tokenizer no data are read. Raises UserError for a config that cannot run.
    """
    if "stages" in config:
        raise UserError(
            "the config has stages, which python -m launch.main runs one after another: name one run's config"
        )
    groups = _read_groups(config, devices)
    name, options = groups.model.name, {**_load_options(groups.model), "planned": planned or like is not None}
    model, tokenizer, base = pretrained.describe(name, groups.options, **options)
    _check_model(groups, model)
    loader = like.loader if like else _make_loader(groups, tokenizer, model)
    if labels := groups.objective.model_options(loader.labels):
        groups.options.update(labels)
        model, _, base = pretrained.describe(name, groups.options, **options)
    run = _assemble_run(groups, model, base, tokenizer, loader)
    if run.adapter and run.model.start == CARRY:
        check_start(run.adapter, groups.top.method, run.shapes, base, model)
    run.optimizer()  # raises UserError for a regex that does not match
    _ = run.attention  # raises UserError for a form that cannot run
    run.check_reference()
    return dataclasses.replace(run, scorer=like.scorer if like else _make_evaluator(groups, run) if tokenizer else None)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The values that the groups of a config become."""

    top: RunConfig
    objective: Objective
    method: Method
    optim: OptimConfig
    checkpoint: CheckpointConfig
    data: data.DataConfig
    eval: EvalConfig
    mesh: Mesh
    model: ModelConfig
    options: dict[str, Any]  # of the model's own config, including the method's
    adapter: SavedAdapter | None


def _read_groups(config: Group, devices: Sequence[Any] | None) -> _Groups:
    top = config_schema.call_with_group(RunConfig, config, "config")
    own, others = _partition_keys(with_precision(top.model), {f.name for f in dataclasses.fields(ModelConfig)})
    model = config_schema.call_with_group(ModelConfig, own, "model")
    top, adapter = read_start(top, model)
    objective, method = build_objective(top.objective), methods.build_method(top.method)
    held = method.hooks.holdout
    asked = {"holdout": held.share, "holdout_batches": held.batches(top.steps)} if held else {}
    make_mesh = sharding.make_mesh if devices is None else functools.partial(sharding.make_mesh_of_devices, devices)
    groups = _Groups(
        top=top,
        objective=objective,
        method=method,
        optim=config_schema.call_with_group(OptimConfig, top.optim, "optim"),
        checkpoint=config_schema.call_with_group(CheckpointConfig, top.checkpoint, "checkpoint"),
        data=config_schema.call_with_group(data.DataConfig, {**top.data, **asked}, "data"),
        eval=config_schema.call_with_group(EvalConfig, top.eval, "eval"),
        mesh=config_schema.call_with_group(make_mesh, top.mesh, "mesh"),
        model=model,
        options=others | dict(method.model_options),
        adapter=adapter,
    )
    optimizer.check_optimizer(groups.optim, top.steps)
    _check_best(groups)
    sharding.check_batch_shape(groups.data.batch_size, groups.data.seq_len, groups.optim.accumulate, groups.mesh)
    return groups


def _check_best(groups: _Groups) -> None:
    """Raises UserError if `checkpoint.best` names a score that the objective lacks or that the run never computes."""
    known = groups.eval.better(groups.objective.score.better)
    if groups.checkpoint.best and groups.checkpoint.best not in known:
        raise unknown("score in checkpoint.best", groups.checkpoint.best, known)
    if groups.checkpoint.best and not (groups.eval.split and groups.eval.every):
        asked = f"checkpoint.best={groups.checkpoint.best} compares periodic evaluations"
        raise UserError(f"{asked}: set eval.split to the held-out data and eval.every to the steps between two of them")


def _partition_keys(group: Group, keys: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(items with these keys, other items)`."""
    return {k: v for k, v in group.items() if k in keys}, {k: v for k, v in group.items() if k not in keys}


def _load_options(model: ModelConfig) -> Mapping[str, Any]:
    return {"param_dtype": model.param_dtype, "quantized": model.quantize, "upcycled": model.upcycle}


def _check_model(groups: _Groups, model: Any) -> None:
    """Raises UserError if the model does not fit the objective, or if the sequences exceed its positions."""
    groups.objective.check_model(groups.model.name, model)
    if groups.method.hooks.map_batch and not groups.objective.on_features:
        raise UserError("the method trains on pooled features alone: set objective=classification, or another method")
    room = model.max_length - model.num_virtual_tokens
    if model.num_virtual_tokens and groups.data.seq_len > room:
        length = f"data.seq_len={groups.data.seq_len} and {plural(model.num_virtual_tokens, 'virtual token')}"
        positions = plural(model.max_length, "position")
        raise UserError(f"{length} exceed the model's {positions}: set data.seq_len to at most {room}")


def _make_loader(groups: _Groups, tokenizer: Tokenizer | None, model: Any) -> Any:
    """The loader of the data; without a tokenizer, one that has shapes alone."""
    positions, row_format = model.max_length - model.num_virtual_tokens, groups.objective.row_format
    if tokenizer:
        return data.make_loader(groups.data, tokenizer, positions, row_format)
    if not all(groups.objective.model_options(()).values()) and not groups.data.labels:
        raise UserError(
            f"{groups.model.name} has no tokenizer, so that no data are read: name the classes in data.labels"
        )
    return data.PlannedLoader(groups.data, row_format, positions)


def _assemble_run(groups: _Groups, model: Any, base: PyTree, tokenizer: Tokenizer, loader: data.Loader) -> Run:
    shapes, mask, table = _adapted_shapes(groups.method, groups.objective, base)
    sharding.parameter_shardings(shapes, groups.mesh)
    decay = optimizer.decay_notes(groups.optim, tree.split(shapes, mask)[0])
    notes = (*groups.top.notes, *_device_notes(groups.optim, model, groups.mesh), *decay)
    return Run(
        config=groups.top,
        objective=groups.objective,
        method=groups.method,
        model=groups.model,
        options=groups.options,
        network=models.build_model(_with_supported_remat(model, groups.mesh)),
        optim=groups.optim,
        checkpoint=groups.checkpoint,
        loader=loader,
        mesh=groups.mesh,
        shapes=shapes,
        mask=mask,
        table="\n".join([table, *notes]),
        tokens_per_step=_tokens_per_step(groups.data, groups.objective, loader),
        tokenizer=tokenizer,
        notes=notes,
        adapter=groups.adapter,
    )


def _make_evaluator(groups: _Groups, run: Run) -> Evaluator | None:
    if not groups.eval.split:
        return None
    network = models.build_model(models.inference_config(run.network.config))
    return Evaluator(
        groups.eval,
        groups.objective,
        groups.data,
        run.tokenizer,
        network,
        run.method.bind,
        run.mesh,
        run.logits_chunk_tokens,
    )


def _adapted_shapes(method: Method, objective: Objective, base: PyTree) -> tuple[PyTree, PyTree, str]:
    """`(shapes, mask, table)` of the adapted parameters; every method also trains the objective's own leaves."""
    method = dataclasses.replace(method, trainable=(*method.trainable, *objective.trainable))
    shapes = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), base)
    mask = methods.trainable_mask(method, shapes)
    if not any(jax.tree.leaves(mask)):
        raise UserError(
            "the method trains none of the model's leaves: give it a target that matches, or another method"
        )
    return shapes, mask, parameter_summary.rule_table(methods.matches(method, shapes), shapes, mask)


def _device_notes(config: OptimConfig, model: Any, mesh: Mesh) -> tuple[str, ...]:
    """Warnings of settings that ask for host memory where the devices cannot address it."""
    if has_host(mesh):
        return ()
    lack = f"{mesh.devices.flat[0].device_kind} does not address {HOST} memory"
    settings = {
        "optim.paged": (config.paged, "the optimizer's state stays"),
        "model.remat=offload": (model.remat == "offload", "the saved activations stay"),
    }
    notes = [f"warning: {key}: {lack}, so {what}" for key, (is_set, what) in settings.items() if is_set]
    return tuple(f"{note} in the device's memory" for note in notes)


def _with_supported_remat(model: Any, mesh: Mesh) -> Any:
    """The model's config for these devices: without host memory, `remat=offload` keeps its arrays on the device."""
    if model.remat != "offload" or has_host(mesh):
        return model
    return dataclasses.replace(model, remat="names", remat_names=model.remat_names or ("input",))


def _tokens_per_step(config: data.DataConfig, objective: Objective, loader: data.Loader) -> float:
    """Real tokens per step of all hosts: packed rows are nearly full, other rows are as long as their sequence."""
    mean = loader.stats["tokens"] / max(1, loader.stats["sequences"])
    return config.batch_size * (config.seq_len if objective.row_format.packs(config) else mean)
