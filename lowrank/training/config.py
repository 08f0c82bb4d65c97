"""What a config may say at its top level, and in the groups that no other module reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.training.loggers import check_loggers

Group = Mapping[str, Any]
MODES = ("auto", "min", "max")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The top level of a config. A group's keys are those of the dataclass or function that reads it."""

    steps: int
    model: Group  # name, param_dtype, and options of the model's config: dtype, remat, ...
    method: Group  # name, and the keywords of that function in `methods`
    data: Group  # data.DataConfig
    optim: Group = dataclasses.field(default_factory=dict)  # optim.OptimConfig
    eval: Group = dataclasses.field(default_factory=dict)  # evaluation.EvalConfig
    mesh: Group = dataclasses.field(default_factory=dict)  # sharding.make_mesh
    checkpoint: Group = dataclasses.field(default_factory=dict)  # checkpoint.Checkpointer
    objective: str | Group = "causal_lm"  # a key of objectives.OBJECTIVES, or its name and options
    seed: int = 0
    # The number of tokens per device whose logits exist at a time; 0: all tokens of the batch. Chunks without any
    # weight are left out.
    logits_chunk_tokens: int = 1024
    log_every: int = 10  # steps
    loggers: tuple[str, ...] = ("tensorboard",)  # keys of loggers.LOGGERS
    distributed: bool = False  # the launcher calls jax.distributed.initialize() first

    def __post_init__(self) -> None:
        for key, least in (("steps", 1), ("log_every", 1), ("logits_chunk_tokens", 0), ("seed", 0)):
            if getattr(self, key) < least:
                raise UserError(f"{key} must be at least {least}, not {getattr(self, key)}")
        check_loggers(self.loggers)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the `model` group says beside the options of the model's own config."""

    name: str
    param_dtype: str = "float32"  # of what is frozen; what is trained is float32
    quantize: Group | str | None = None  # a scheme, or its name, target and options: pretrained.quantize
    upcycle: Group | None = None  # experts and top_k: pretrained.upcycle


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The `checkpoint` group."""

    every: int = 0  # steps; 0: only at SIGTERM and at the end
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
