"""A config becomes a checked plan: all that can be wrong is found before a weight is read or anything is computed."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank import data, methods, models, pretrained
from lowrank.core import config_schema, parameter_summary, sharding
from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.typing import PyTree, Tokenizer
from lowrank.evaluation.evaluator import EvalConfig, Evaluator
from lowrank.methods import Method
from lowrank.objectives import Objective, build_objective
from lowrank.training import optimizer
from lowrank.training.config import CheckpointConfig, Group, ModelConfig, RunConfig
from lowrank.training.offload import HOST, has_host
from lowrank.training.optimizer import OptimConfig
from lowrank.training.run import Run


def build_run(config: Group, devices: Sequence[Any] | None = None, like: Run | None = None) -> Run:
    """Checks a config (a ConfigDict or nested dicts) against the model, the data and the mesh. Raises UserError.

    `devices` are the mesh's if they are not this machine's: such a plan is only compiled. `like` is a plan of the same
    data, whose loader and scorer serve again.
    """
    groups = _groups(config, devices)
    name, how = groups.model.name, _how_to_read(groups.model)
    shape, tokenizer, base = pretrained.describe(name, groups.options, **how)
    _check_model(groups, shape)
    loader = like.loader if like else _loader(groups, tokenizer, shape)
    if options := groups.objective.model_options(loader.labels):
        groups.options.update(options)
        shape, _, base = pretrained.describe(name, groups.options, **how)
    plan = _plan(groups, shape, base, tokenizer, loader)
    plan.optimizer()
    return dataclasses.replace(plan, scorer=like.scorer if like else _scorer(groups, plan))


@dataclasses.dataclass(frozen=True)
class _Groups:
    """A config's groups, each as what it becomes; `options` are the model config's own, the method's among them."""

    top: RunConfig
    objective: Objective
    method: Method
    optim: OptimConfig
    checkpoint: CheckpointConfig
    data: data.DataConfig
    eval: EvalConfig
    mesh: Mesh
    model: ModelConfig
    options: dict[str, Any]


def _groups(config: Group, devices: Sequence[Any] | None) -> _Groups:
    top = config_schema.call_with_group(RunConfig, config, "config")
    objective, method = build_objective(top.objective), methods.build_method(top.method)
    asked = {"holdout": method.hooks.holdout} if method.hooks.holdout else {}
    make_mesh = sharding.make_mesh if devices is None else functools.partial(sharding.make_mesh_of_devices, devices)
    own, others = _parted(top.model, {f.name for f in dataclasses.fields(ModelConfig)})
    groups = _Groups(
        top=top,
        objective=objective,
        method=method,
        optim=config_schema.call_with_group(OptimConfig, top.optim, "optim"),
        checkpoint=config_schema.call_with_group(CheckpointConfig, top.checkpoint, "checkpoint"),
        data=config_schema.call_with_group(data.DataConfig, {**top.data, **asked}, "data"),
        eval=config_schema.call_with_group(EvalConfig, top.eval, "eval"),
        mesh=config_schema.call_with_group(make_mesh, top.mesh, "mesh"),
        model=config_schema.call_with_group(ModelConfig, own, "model"),
        options=others | dict(method.model_options),
    )
    optimizer.check_optimizer(groups.optim, top.steps)
    _check_best(groups)
    sharding.check_batch_size(groups.data.batch_size, groups.optim.accumulate, groups.mesh)
    return groups


def _check_best(groups: _Groups) -> None:
    """Raises UserError for a best checkpoint by a score that the objective lacks, or that is never computed."""
    if groups.checkpoint.best and groups.checkpoint.best not in groups.objective.score.better:
        raise unknown("score in checkpoint.best", groups.checkpoint.best, groups.objective.score.better)
    if groups.checkpoint.best and not (groups.eval.split and groups.eval.every):
        asked = f"checkpoint.best={groups.checkpoint.best} compares periodic evaluations"
        raise UserError(f"{asked}: set eval.split to the held-out data and eval.every to the steps between two of them")


def _parted(group: Group, keys: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(what is under these keys, the rest)`."""
    return {k: v for k, v in group.items() if k in keys}, {k: v for k, v in group.items() if k not in keys}


def _how_to_read(model: ModelConfig) -> Mapping[str, Any]:
    return {"param_dtype": model.param_dtype, "quantized": model.quantize, "upcycled": model.upcycle}


def _check_model(groups: _Groups, shape: Any) -> None:
    """Raises UserError where the model does not fit the objective, or the sequences not into its positions."""
    groups.objective.check_model(groups.model.name, shape)
    if groups.method.hooks.map_batch and not groups.objective.on_features:
        raise UserError("the method trains on pooled features alone: set objective=classification, or another method")
    if shape.num_virtual_tokens and groups.data.seq_len > shape.max_length - shape.num_virtual_tokens:
        length = f"data.seq_len={groups.data.seq_len}"
        raise UserError(
            f"{length} and {plural(shape.num_virtual_tokens, 'virtual token')} exceed the model's "
            f"{plural(shape.max_length, 'position')}"
        )


def _loader(groups: _Groups, tokenizer: Tokenizer, shape: Any) -> data.Loader:
    return data.make_loader(
        groups.data,
        tokenizer,
        jax.process_index(),
        jax.process_count(),
        shape.max_length - shape.num_virtual_tokens,
        groups.objective.row_format,
    )


def _plan(groups: _Groups, shape: Any, base: PyTree, tokenizer: Tokenizer, loader: data.Loader) -> Run:
    shapes, mask, table = _split(groups.method, groups.objective, base)
    sharding.parameter_shardings(shapes, groups.mesh)
    notes = _notes(groups.optim, shape, groups.mesh)
    return Run(
        config=groups.top,
        objective=groups.objective,
        method=groups.method,
        model=groups.model,
        options=groups.options,
        network=models.build_model(_offloading(shape, groups.mesh)),
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
    )


def _scorer(groups: _Groups, plan: Run) -> Evaluator | None:
    if not groups.eval.split:
        return None
    used = models.build_model(models.inference_config(plan.network.config))
    return Evaluator(
        groups.eval,
        groups.objective,
        groups.data,
        plan.tokenizer,
        used,
        plan.method.bind,
        plan.mesh,
        plan.logits_chunk_tokens,
    )


def _split(method: Method, objective: Objective, base: PyTree) -> tuple[PyTree, PyTree, str]:
    """`(shapes, mask, table)` of the adapted parameters; the objective's own leaves are trained with every method."""
    method = dataclasses.replace(method, trainable=(*method.trainable, *objective.trainable))
    shapes = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), base)
    mask = methods.trainable_mask(method, shapes)
    if not any(jax.tree.leaves(mask)):
        raise UserError("the method trains nothing")
    return shapes, mask, parameter_summary.rule_table(methods.matches(method, shapes), shapes, mask)


def _notes(config: OptimConfig, model: Any, mesh: Mesh) -> tuple[str, ...]:
    if has_host(mesh):
        return ()
    lack = f"{mesh.devices.flat[0].device_kind} has no {HOST} memory"
    stays = {"optim.paged": config.paged and "the optimizer's state stays", "model.remat=offload": ""}
    if model.remat == "offload":
        stays["model.remat=offload"] = "what would be offloaded stays"
    return tuple(f"warning: {key}: {lack}, so {what} in the device's" for key, what in stays.items() if what)


def _offloading(shape: Any, mesh: Mesh) -> Any:
    """The model's config as the devices can have it: what would be offloaded is kept where they have no host memory."""
    if shape.remat != "offload" or has_host(mesh):
        return shape
    return dataclasses.replace(shape, remat="names", remat_names=shape.remat_names or ("input",))


def _tokens_per_step(config: data.DataConfig, objective: Objective, loader: data.Loader) -> float:
    """Real tokens per step of all hosts: packed rows are nearly full, others are as long as their sequence."""
    mean = loader.stats["tokens"] / max(1, loader.stats["sequences"])
    return config.batch_size * (config.seq_len if objective.row_format.packs(config) else mean)
