"""A config becomes a checked plan: all that can be wrong is found before a weight is read or anything is computed."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank import data, methods, models, pretrained
from lowrank.core import config_schema, parameter_summary, sharding
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.evaluation.evaluator import EvalConfig, Evaluator
from lowrank.methods import Method
from lowrank.objectives import losses
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
    describe = functools.partial(pretrained.describe, groups.model.name, **_how_to_read(groups.model))
    shape, tokenizer, base = describe(groups.options)
    _check_model(groups, shape)
    loader = like.loader if like else _loader(groups.data, tokenizer, shape)
    if loader.labels:
        groups.options["num_labels"] = len(loader.labels)
        shape, _, base = describe(groups.options)
    plan = _plan(groups, shape, base, tokenizer, loader)
    plan.optimizer()
    return dataclasses.replace(plan, scorer=like.scorer if like else _scorer(groups, plan))


@dataclasses.dataclass(frozen=True)
class _Groups:
    """A config's groups, each as what it becomes; `options` are the model config's own, the method's among them."""

    top: RunConfig
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
    losses.objective(top.objective)
    method = methods.build_method(top.method)
    asked = {"objective": top.objective} | ({"holdout": method.hooks.holdout} if method.hooks.holdout else {})
    make_mesh = sharding.make_mesh if devices is None else functools.partial(sharding.make_mesh_of_devices, devices)
    own, others = _parted(top.model, {f.name for f in dataclasses.fields(ModelConfig)})
    groups = _Groups(
        top=top,
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
    """Raises UserError where a best checkpoint is asked for and no evaluation would find it."""
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
    if groups.top.objective == "causal_lm" and not isinstance(shape, models.DecoderConfig):
        raise UserError(f"{groups.model.name} is an encoder: it is fine-tuned with objective=classification")
    if shape.num_virtual_tokens and groups.data.seq_len > shape.max_length - shape.num_virtual_tokens:
        length = f"data.seq_len={groups.data.seq_len}"
        raise UserError(
            f"{length} and {shape.num_virtual_tokens} virtual tokens exceed the model's {shape.max_length} positions"
        )


def _loader(config: data.DataConfig, tokenizer: Any, shape: Any) -> data.Loader:
    processes = jax.process_index(), jax.process_count()
    return data.make_loader(config, tokenizer, *processes, shape.max_length - shape.num_virtual_tokens)


def _plan(groups: _Groups, shape: Any, base: PyTree, tokenizer: Any, loader: data.Loader) -> Run:
    shapes, mask, table = _split(groups.method, base, bool(loader.labels))
    sharding.parameter_shardings(shapes, groups.mesh)
    notes = _notes(groups.optim, shape, groups.mesh)
    return Run(
        config=groups.top,
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
        tokens_per_step=_tokens_per_step(groups.data, loader),
        tokenizer=tokenizer,
        notes=notes,
    )


def _scorer(groups: _Groups, plan: Run) -> Evaluator | None:
    if not groups.eval.split:
        return None
    used = models.build_model(models.inference_config(plan.network.config))
    return Evaluator(
        groups.eval, groups.data, plan.tokenizer, used, plan.method.bind, plan.mesh, plan.logits_chunk_tokens
    )


def _split(method: Method, base: PyTree, labelled: bool) -> tuple[PyTree, PyTree, str]:
    """`(shapes, mask, table)` of the adapted parameters; a classifier's head is new, so it is always trained."""
    method = dataclasses.replace(method, trainable=(*method.trainable, *(("head/.*",) if labelled else ())))
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


def _tokens_per_step(config: data.DataConfig, loader: data.Loader) -> float:
    """Real tokens a step of all hosts: rows that are packed are nearly full, others are as long as their sequence."""
    mean = loader.stats["tokens"] / max(1, loader.stats["sequences"])
    packed = config.packing and not loader.labels
    return config.batch_size * (config.seq_len if packed else mean)
