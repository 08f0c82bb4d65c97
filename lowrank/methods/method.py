"""The definition of a method: a setting of knobs, which a run reads without knowing any method by name."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from lowrank.core import weight
from lowrank.core.typing import Batch, BatchInfo, Bind, PyTree, Sums
from lowrank.methods import targets

SHARED = "shared"  # the root of the leaves that belong to no single weight


@dataclasses.dataclass(frozen=True)
class Context:
    """The parts of a run that `Hooks.calibrate` may read: its data, its loss, its tokenizer."""

    key: jax.Array
    tokenizer: Any
    batches: Callable[[int], Sequence[Batch]]  # n -> the first n training batches; training still starts at the first
    loss: Callable[[PyTree, Batch], Sums]  # (params, batch) -> sums
    batch_info: Callable[[Batch], BatchInfo]  # the part of a batch that methods may read
    mask: PyTree  # bools over the adapted parameters: the trained leaves
    model: Any = None  # the model's config


InitShared = Callable[[PyTree, jax.Array], PyTree]  # (base, key) -> the leaves under `shared/`
Calibrate = Callable[[PyTree, Context], PyTree]  # (params, context) -> params of the same shapes
TotalLoss = Callable[[PyTree], Sums]  # (bound params) -> the objective's sums over one batch
# (loss, bound params, batch, scale) -> the loss's sums, whose gradient has further terms, in proportion to `scale`.
# The value of the sums stays as it is, so that the losses of methods compare.
Regularizer = Callable[[TotalLoss, PyTree, BatchInfo, jax.Array], Sums]
RegularizerScale = Callable[[jax.Array, int], jax.Array]  # (step from 0, the run's steps) -> scale
WrapOptimizer = Callable[[optax.GradientTransformation, int], optax.GradientTransformation]  # (the run's, its steps)
MapRates = Callable[[np.ndarray], np.ndarray]  # `[steps]` learning rates of the schedule -> those of the run
MapBatch = Callable[[Batch], Batch]  # a host's batch -> the batch that the loss receives in its place
InitMapBatch = Callable[[Any, PyTree], MapBatch]  # (network, frozen leaves) -> the map, before step 1


@dataclasses.dataclass(frozen=True)
class EveryNSteps:
    """A change of the parameters before steps k, 2k, ... (from 0). The frozen leaves that it changes are saved."""

    every: float  # k; below 1, a share of the run's steps
    change: Callable[[PyTree, jax.Array], PyTree]  # (params, key) -> params of the same shapes

    def interval(self, steps: int) -> int:
        """The number of steps between two changes in a run of `steps`."""
        return max(1, targets.count_steps(self.every, steps))


@dataclasses.dataclass(frozen=True)
class Holdout:
    """Training records that batches 1, 3, ... (from 0) are drawn from, and no others; the other batches avoid them."""

    share: float  # of the training records
    rest: float = 0.0  # the last share of the run's steps, in which every batch is drawn from all records

    def batches(self, steps: int) -> int:
        """The number of batches before the rest in a run of `steps`; odd, so that other records are in the last one."""
        before = steps - round(self.rest * steps)
        return max(1, before - 1 + before % 2) if self.rest else steps


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The knobs that few methods use. Each default leaves the run as it is."""

    calibrate: Calibrate | None = None  # is called once, before step 1
    regularizer: Regularizer | None = None  # see `lowrank.methods.regularizers`
    regularizer_scale: RegularizerScale | None = None  # None: 1 at every step
    optimizer: WrapOptimizer | None = None  # works inside the trained tree, and passes `lr` on
    rescaling: WrapOptimizer | None = None  # of a label group's clipped gradients, before the decay and the rate
    map_batch: InitMapBatch | None = None
    learning_rates: MapRates | None = None
    every_n_steps: EveryNSteps | None = None
    holdout: Holdout | None = None
    freeze: tuple[str, ...] = ()  # regexes over leaves that stay frozen although their form declares them trainable
    by_layer: tuple[tuple[str, str], ...] = ()  # (target, pattern): every pattern must match a targeted layer


@dataclasses.dataclass(frozen=True)
class Export:
    """The leaves that an adapter saves beside the trained ones."""

    frozen: tuple[str, ...] = ()  # regexes over frozen leaves, such as those that `calibrate` chooses
    bound: bool = False  # whether the leaves that `bind` computes are saved in place of the shared leaves


@dataclasses.dataclass(frozen=True)
class Method:
    """The changes that a method makes to a run. `rules`, `model_options` and `trainable` suffice for most methods."""

    rules: tuple[tuple[str, weight.Rewrite], ...] = ()  # (regex over weight names, rewrite), applied in order
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of the model's config
    trainable: tuple[str, ...] = ()  # regexes over leaves to train beside the fields that forms declare trainable
    bind: Bind | None = None  # (params, batch, rng or None) -> params, inside the loss
    init_shared: InitShared | None = None
    export: Export = Export()
    hooks: Hooks = Hooks()
