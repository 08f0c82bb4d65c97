"""The config of a run: its top level, and the groups `model` and `checkpoint`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.training.loggers import check_loggers

Group = Mapping[str, Any]
MODES = ("auto", "min", "max")
# An adapter is trained further, or it is merged into its base, on which a new method begins.
STARTS = CARRY, MERGE = "carry", "merge"
# The dtype of the frozen leaves, and that of the activations. Products of float32 activations with bfloat16 weights
# round the activations to bfloat16, and sum in float32.
PRECISIONS = {
    "float32": {"param_dtype": "float32", "dtype": "float32"},
    "bf16": {"param_dtype": "bfloat16", "dtype": "bfloat16"},
    "bf16_f32": {"param_dtype": "bfloat16", "dtype": "float32"},
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The top level of a config. The keys of a group are those of the dataclass or function that reads it."""

    steps: int
    model: Group  # ModelConfig, and options of the model's own config: dtype, remat, ...
    method: Group  # name, and the keywords of that function in `methods`
    data: Group  # data.DataConfig
    optim: Group = dataclasses.field(default_factory=dict)  # optimizer.OptimConfig
    eval: Group = dataclasses.field(default_factory=dict)  # evaluator.EvalConfig
    mesh: Group = dataclasses.field(default_factory=dict)  # sharding.make_mesh
    checkpoint: Group = dataclasses.field(default_factory=dict)  # CheckpointConfig
    objective: str | Group = "causal_lm"  # a key of objectives.OBJECTIVES, or its name and options
    seed: int = 0
    # The number of tokens per device whose logits exist at a time; 0: all tokens of the batch. Chunks without any
    # weight are left out.
    logits_chunk_tokens: int = 1024
    log_every: int = 10  # the number of steps between logged losses
    loggers: tuple[str, ...] = ("tensorboard",)  # keys of loggers.LOGGERS
    notes: tuple[str, ...] = ()  # lines that the log shows before the first step
    distributed: bool = False  # the launcher calls jax.distributed.initialize() first

    def __post_init__(self) -> None:
        for key, least in (("steps", 1), ("log_every", 1), ("logits_chunk_tokens", 0), ("seed", 0)):
            if getattr(self, key) < least:
                raise UserError(f"{key} must be at least {least}, not {getattr(self, key)}")
        if self.seed >= 2**63:
            raise UserError(f"seed must be below 2**63, not {self.seed}")
        check_loggers(self.loggers)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The keys of the `model` group that are not options of the model's own config."""

    name: str
    param_dtype: str = "float32"  # of the frozen leaves; the trained leaves are float32
    precision: str = ""  # a key of PRECISIONS, which sets `param_dtype` and the option `dtype`; "": they are as given
    quantize: Group | str | None = None  # the name of a scheme, or its name, target and options
    upcycle: Group | None = None  # experts and top_k: each MLP becomes a mixture of experts
    adapter: str = ""  # the folder or hub id of the adapter that the run starts from
    start: str = CARRY  # what becomes of it, one of STARTS

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise unknown("model.start", self.start, STARTS)
        if self.start != CARRY and not self.adapter:
            raise UserError(f"model.start={self.start} needs an adapter: name its folder or hub id in model.adapter")


def with_precision(group: Group) -> Group:
    """The `model` group with the dtypes that its `precision` sets.

    Raises UserError for an unknown precision, and for a dtype that the group sets to another value.
    """
    name = group.get("precision")
    if not name:
        return group
    if name not in PRECISIONS:
        raise unknown("model.precision", name, PRECISIONS)
    for key, dtype in PRECISIONS[name].items():
        if group.get(key, dtype) != dtype:
            raise UserError(
                f"model.{key}={group[key]} contradicts model.precision={name}, which sets it to {dtype}: leave one out"
            )
    return {**group, **PRECISIONS[name]}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` group."""

    every: int = 0  # the number of steps between checkpoints; 0: only at SIGTERM and at the end
    keep: int = 2  # the number of the newest checkpoints that stay on disk
    best: str = ""  # a score of the periodic evaluation, whose best step gives the adapter; "": the last step does
    mode: str = "auto"  # the direction of the best score: min, max, or auto, which is that of the objective
    patience: int = 0  # evaluations without a better score after which the run stops early; 0: the run does not
    min_delta: float = 0.0  # a better score exceeds the best one by more than this

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise UserError(f"checkpoint.every={self.every} must be >= 0 and checkpoint.keep={self.keep} must be >= 1")
        if self.mode not in MODES:
            raise unknown("checkpoint.mode", self.mode, MODES)
        if self.patience < 0 or self.min_delta < 0:
            raise UserError("checkpoint.patience and checkpoint.min_delta must not be negative")
        if self.patience and not self.best:
            raise UserError("checkpoint.patience counts evaluations without a better score: name it in checkpoint.best")
