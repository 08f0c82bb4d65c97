"""The optimizer of the trained tree: one optax transformation per label group, and a clip before all groups.

The optimizer never reads frozen leaves: the trained tree has None in their place. The learning rate is an argument of
each update, so that the runs of a sweep over learning rates share one compiled program.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank.core import config_schema, tree, weight
from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.typing import PyTree
from lowrank.methods.method import WrapOptimizer
from lowrank.training.stacked_optimizer import per_matrix


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The `optim` group of a config."""

    name: str = "adamw"  # a key of OPTIMIZERS
    lr: float = 1e-4  # the peak learning rate
    schedule: str = "cosine"  # a key of SCHEDULES
    warmup: int = 0  # the number of steps of linear warmup
    # The first value of the warmup, as a fraction of lr. Continued pre-training warms up again from the rate at which
    # the first one ended (arXiv:2308.04014).
    initial: float = 0.0
    final: float = 0.0  # the last value of the linear and cosine schedules, as a fraction of lr
    weight_decay: float = 0.0  # decoupled, and multiplied by the learning rate
    # A regex of the model's leaves without decay. Vectors (one per layer in a stack) never decay, and the fields of a
    # form declare whether they do.
    no_decay: str = r"(.*/)?(bias|scale|embedding)"
    clip: float = 1.0  # the largest global norm of the trained tree's gradient; 0 does not clip
    b_ratio: float = 1.0  # LoRA+: the learning rate of the leaves named b over that of the others (arXiv:2402.12354)
    lr_ratios: tuple[tuple[str, float], ...] = ()  # (regex, ratio); the first match applies, 0 freezes a trained leaf
    accumulate: int = 1  # the number of microbatches per step
    paged: bool = False  # the state lies in pinned host memory and is streamed leaf by leaf for the update
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keywords of the optimizer: b2, momentum, ...


def sgd(momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    """SGD's rescaling: the gradient itself, or its momentum."""
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


def adafactor(
    decay_rate: float = 0.8, clipping: float = 1.0, parameter_scale: bool = True, min_dim_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Adafactor's rescaling (Shazeer & Stern 2018, arXiv:1804.04235): factored second moments, without momentum."""
    return per_matrix(
        optax.chain(
            optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor),
            optax.clip_by_block_rms(clipping),
            optax.scale_by_param_block_rms() if parameter_scale else optax.identity(),
        )
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adafactor": adafactor,
    "sgd": sgd,
    "lion": optax.scale_by_lion,
}

SCHEDULES: dict[str, Callable[[float, int, float], optax.Schedule]] = {
    "constant": lambda lr, steps, final: optax.constant_schedule(lr),
    "linear": lambda lr, steps, final: optax.linear_schedule(lr, lr * final, steps),
    "cosine": lambda lr, steps, final: optax.cosine_decay_schedule(lr, steps, final),
}


def learning_rate_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate by step in a run of `steps` steps: `warmup` steps to `lr`, then the schedule."""
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)
    decay = SCHEDULES[config.schedule](config.lr, max(1, steps - config.warmup), config.final)
    if not config.warmup:
        return decay
    rise = optax.linear_schedule(config.lr * config.initial, config.lr, config.warmup)
    return optax.join_schedules([rise, decay], [config.warmup])


def learning_rates(config: OptimConfig, steps: int) -> np.ndarray:
    """`[steps]` float32: the learning rate of each step of a run."""
    values = np.asarray(learning_rate_schedule(config, steps)(jnp.arange(steps)), np.float32)
    return np.broadcast_to(values, (steps,))


def scale_by_given_rate(ratio: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates by `-lr * ratio`, where `lr` is an extra argument of each update."""

    def update(updates: PyTree, state: PyTree, trained: PyTree = None, *, lr: jax.Array, **_: Any) -> tuple:
        return jax.tree.map(lambda u: jnp.asarray(-lr * ratio, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda trained: optax.EmptyState(), update)


def check_optimizer(config: OptimConfig, steps: int) -> None:
    """Raises UserError for an unknown name or key, or for a value out of range."""
    if config.name not in OPTIMIZERS:
        raise unknown("optimizer", config.name, OPTIMIZERS)
    config_schema.call_with_group(OPTIMIZERS[config.name], config.args, "optim.args")
    learning_rate_schedule(config, steps)
    for key in ("lr", "warmup", "initial", "final", "weight_decay", "clip", "b_ratio"):
        if not 0 <= getattr(config, key) < math.inf:
            raise UserError(f"optim.{key} must be a finite number of at least 0, not {getattr(config, key)}")
    for pattern in (config.no_decay, *(pattern for pattern, _ in config.lr_ratios)):
        tree.compile_regex(pattern, "optim pattern")
    if config.accumulate < 1:
        raise UserError(f"optim.accumulate must be at least 1, not {config.accumulate}")
    if config.initial and not config.warmup:
        raise UserError(f"optim.initial={config.initial} is where the warmup begins: set optim.warmup to its steps")
    if config.warmup > steps:
        length = f"optim.warmup={config.warmup} is longer than the run of {plural(steps, 'step')}"
        raise UserError(f"{length}: lower optim.warmup or raise steps")


def optimizer_labels(config: OptimConfig, trained: PyTree) -> PyTree:
    """`ratio:decay` for each trained leaf (`16.0:0.0`): leaves that share a label share an optimizer."""
    names = tree.leaf_names(trained)
    ratios = (*config.lr_ratios, *(((r"(.*/)?b", config.b_ratio),) if config.b_ratio != 1 else ()))
    for pattern, _ in ratios:
        tree.match_names(pattern, names, "learning rate pattern")

    declared = dict(tree.named_leaves(_decay_mask(trained)))

    def label(name: str, _: Any) -> str:
        ratio = next((ratio for pattern, ratio in ratios if re.fullmatch(pattern, name)), 1.0)
        decays = declared[name] and not re.fullmatch(config.no_decay, name)
        return f"{float(ratio)}:{config.weight_decay if decays else 0.0}"

    return tree.map_named(label, trained)


def decay_notes(config: OptimConfig, trained: PyTree) -> tuple[str, ...]:
    """A note on the leaves of `trained` that decay and hold changes of pretrained values, if there are any."""
    changes = jax.tree.map(
        lambda w: weight.map_fields(lambda field, _: field.metadata["change"], w) if weight.is_weight(w) else False,
        trained,
        is_leaf=weight.is_weight,
    )
    decays = [_factors(label)[1] > 0 for _, label in tree.named_leaves(optimizer_labels(config, trained))]
    named = zip(tree.named_leaves(changes), decays, strict=True)
    names = [name for (name, change), decay in named if change and decay]
    if not names:
        return ()
    return (f"optim.weight_decay acts on {', '.join(names)}: it draws the changed weights to their pretrained values",)


def _check_decay(config: OptimConfig, of_leaf: PyTree) -> None:
    """Raises UserError for a weight decay that acts on none of the trained leaves."""
    acting = [label for _, label in tree.named_leaves(of_leaf) if 0.0 not in _factors(label)]
    if config.weight_decay and not acting:
        raise UserError(
            f"optim.weight_decay={config.weight_decay} acts on none of the trained leaves: they are vectors, frozen by "
            "optim.lr_ratios, matched by optim.no_decay or declared without decay; set it to 0"
        )


def _factors(label: str) -> tuple[float, float]:
    """`(ratio of the learning rate, weight decay)` of a label."""
    ratio, decay = map(float, label.split(":"))
    return ratio, decay


def _decay_mask(trained: PyTree) -> PyTree:
    """A tree of bools: each form's fields declare their decay, and all plain leaves except vectors decay."""

    def decay(name: str, w: Any) -> Any:
        if weight.is_weight(w):
            return weight.map_fields(lambda field, _: field.metadata["decay"], w)
        return w.ndim - tree.stack_depth(name) >= 2

    return tree.map_named(decay, trained, is_leaf=weight.is_weight)


def build_optimizer(
    config: OptimConfig, steps: int, trained: PyTree, wrap: WrapOptimizer | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `trained` (arrays or shapes, None where frozen) for a run of `steps` steps.

    Its updates take the extra argument `lr`, which `learning_rates` returns for each step. `wrap(rescaling, steps)`
    takes the place of the rescaling that `config.name` names: the clip comes before it, and the weight decay and the
    learning rate after it. Raises UserError as `check_optimizer` does.
    """
    check_optimizer(config, steps)
    rescaling = config_schema.call_with_group(OPTIMIZERS[config.name], config.args, "optim.args")
    rescaling = wrap(rescaling, steps) if wrap else rescaling
    of_leaf = optimizer_labels(config, trained)
    _check_decay(config, of_leaf)
    groups = {label: _group(rescaling, label) for label in sorted({v for _, v in tree.named_leaves(of_leaf)})}
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, optax.multi_transform(groups, of_leaf))


def _group(rescaling: optax.GradientTransformation, label: str) -> optax.GradientTransformation:
    ratio, decay = _factors(label)
    if not ratio:
        return optax.set_to_zero()
    return optax.chain(
        rescaling,
        optax.add_decayed_weights(decay) if decay else optax.identity(),
        scale_by_given_rate(ratio),
    )
