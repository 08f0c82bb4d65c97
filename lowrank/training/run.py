"""A checked run: the values that its steps are built from, its loss, and the method's calibration and restarts."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lowrank import data, methods, models, pretrained
from lowrank.adapters import saved_adapter
from lowrank.adapters.saved_adapter import SavedAdapter
from lowrank.core import sharding, tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, PyTree, Sums
from lowrank.evaluation.evaluator import Evaluator
from lowrank.methods import Method
from lowrank.objectives import Objective
from lowrank.objectives.objective import COPIED, REFERENCE
from lowrank.training import optimizer as optim
from lowrank.training import random_streams, step
from lowrank.training.config import CARRY, CheckpointConfig, ModelConfig, RunConfig
from lowrank.training.offload import has_host
from lowrank.training.optimizer import OptimConfig
from lowrank.training.passthrough import jit_passthrough, output_sources


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked run: a method and an objective on a model, data and a mesh."""

    config: RunConfig
    objective: Objective
    method: Method
    model: ModelConfig
    options: dict[str, Any]  # of the model's own config, including the method's
    network: Any
    optim: OptimConfig
    checkpoint: CheckpointConfig
    loader: data.Loader
    mesh: Mesh
    shapes: PyTree  # of the adapted parameters
    mask: PyTree  # bools: whether a leaf of the adapted parameters is trained
    table: str  # the leaves that each rule matched, and the share of trained parameters
    tokens_per_step: float
    tokenizer: Any
    notes: tuple[str, ...] = ()  # those of the config; features that the devices lack, and the replacements
    scorer: Evaluator | None = None
    adapter: SavedAdapter | None = None  # that the run starts from

    @property
    def paged(self) -> bool:
        """Whether the optimizer's state lies in the host's memory: `optim.paged` asks for it and the devices can."""
        return self.optim.paged and has_host(self.mesh)

    @property
    def logits_chunk_tokens(self) -> int:
        """The number of tokens, on all devices together, whose logits exist at a time; 0: all tokens of a batch."""
        return self.config.logits_chunk_tokens * sharding.num_token_shards(self.mesh)

    @functools.cached_property
    def attention(self) -> str:
        """The line of the log on the form of attention. Raises UserError if the config names one that cannot run."""
        rows, *_, length = self.loader.shapes["tokens"][0]
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return models.describe_attention(self.network.config, self.mesh.devices.flat[0], rows, length)

    def load(self) -> pretrained.Pretrained:
        """The base, each leaf with its sharding on the mesh."""
        return pretrained.load(
            self.model.name,
            param_dtype=self.model.param_dtype,
            mesh=self.mesh,
            rules=sharding.DEFAULT_RULES,
            model=self.options,
            quantized=self.model.quantize,
            upcycled=self.model.upcycle,
            seed=self.config.seed,
        )

    def attach(self, params: PyTree) -> tuple[PyTree, PyTree | None]:
        """`(adapted, original)`: the parameters after the method's rules, and the parameters before them.

        The adapted parameters have their shardings on the mesh, and their trained leaves are float32. `original` is
        None unless a rule changed a base, as PiSSA does.
        """
        where = sharding.parameter_shardings(self.shapes, self.mesh)
        attach = functools.partial(methods.attach, self.method, key=random_streams.attach_key(self.config.seed))
        adapted = jit_passthrough(attach, where, params)(params)
        changed = _bases_changed(params, adapted)
        adapted = jax.tree.map(lambda x, learns: x.astype("float32") if learns else x, adapted, self.mask)
        return jax.device_put(adapted, where), params if changed else None

    def start(
        self, params: PyTree, optimizer: optax.GradientTransformation
    ) -> tuple[step.State, PyTree, PyTree | None]:
        """`(state, frozen leaves, original)` before the first step; `attach` describes `original`."""
        params, original = self.start_params(params)
        trained, frozen = tree.split(params, self.mask)
        return step.init_state(trained, optimizer, self.mesh, self.paged, self.copied), frozen, original

    def start_params(self, params: PyTree) -> tuple[PyTree, PyTree | None]:
        """`(the adapted parameters that the run starts from, original)`, as `attach` describes it.

        They are calibrated by the data, or those of the adapter that the run trains further.
        """
        adapted, original = self.attach(params)
        if self.adapter and self.model.start == CARRY:
            return saved_adapter.carried(self.adapter, params, adapted, self.mask), original
        return self.calibrate(adapted), original

    def calibrate(self, params: PyTree) -> PyTree:
        """The adapted parameters after the method's calibration by the data; shapes and shardings stay."""
        calibrate = self.method.hooks.calibrate
        if not calibrate:
            return params
        key = random_streams.calibrate_key(self.config.seed)
        loss = _refuse_loss if self.objective.rollout else functools.partial(self._loss_at_start, rng=None)
        context = methods.Context(
            key,
            self.tokenizer,
            self._first_batches,
            loss,
            self.objective.batch_info,
            self.mask,
            self.network.config,
        )
        return jax.device_put(calibrate(params, context), sharding.parameter_shardings(self.shapes, self.mesh))

    def restarts_at(self, done: int) -> bool:
        """Whether the method restarts before step `done` (from 0)."""
        restarts = self.method.hooks.every_n_steps
        return restarts is not None and done > 0 and done % restarts.interval(self.config.steps) == 0

    def restart(self, params: PyTree, done: int) -> PyTree:
        """The parameters that step `done` (from 0) starts from, if the method restarts there."""
        return self._restarted(params, random_streams.restart_key(self.config.seed, done))

    @functools.cached_property
    def _restarted(self) -> Callable[[PyTree, jax.Array], PyTree]:
        restarts = self.method.hooks.every_n_steps
        assert restarts is not None
        change = restarts.change
        return jit_passthrough(change, sharding.parameter_shardings(self.shapes, self.mesh), self.shapes, _key())

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """The names of the leaves that are not trained."""
        return frozenset(tree.leaf_names(tree.split(self.shapes, self.mask)[1]))

    def check_new(self, new: Sequence[str]) -> None:
        """Raises UserError for one of the leaves that the base's checkpoint lacks if it would stay random."""
        calibrated = {n for p in self.method.export.frozen for n in new if re.fullmatch(p, n)}
        for name in sorted((set(new) - calibrated) & self.frozen):
            raise UserError(
                f"the model's checkpoint lacks {name}, and the method does not train it, so it would stay random: "
                "choose a method that trains it, or a model that has it"
            )

    def check_reference(self) -> None:
        """Raises UserError where a copy of the trained leaves would not give back the start of the run."""
        if self.copied and self._changed_by_restarts():
            raise UserError(
                f"the method's restarts change frozen leaves, so that {self.config.objective} has no copy of its start "
                "to compare with: choose another method, or objective=preference with its stored reference"
            )

    @functools.cached_property
    def changing(self) -> frozenset[str]:
        """The names of the frozen leaves that a checkpoint holds: calibration or restarts change them."""
        patterns = self.method.export.frozen if self.method.hooks.calibrate else ()
        return self._changed_by_restarts() | {n for p in patterns for n in self.frozen if re.fullmatch(p, n)}

    def _changed_by_restarts(self) -> frozenset[str]:
        if not self.method.hooks.every_n_steps:
            return frozenset()
        _, sources = output_sources(self.method.hooks.every_n_steps.change, self.shapes, _key())
        learns = jax.tree.leaves(self.mask)
        names = enumerate(tree.leaf_names(self.shapes))
        return frozenset(name for i, name in names if sources[i] != i and not learns[i])

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch of the loader on the devices of the mesh."""
        return sharding.make_global_batch(batch, self.mesh, self.objective.row_format.per_token)

    def _first_batches(self, n: int) -> list[Batch]:
        start = self.loader.get_state()
        batches: list[Batch] = [self.put(batch) for batch in itertools.islice(self.loader, n)]
        self.loader.set_state(start)
        return batches

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the trained leaves."""
        hooks, steps = self.method.hooks, self.config.steps
        plain = optim.build_optimizer(self.optim, steps, tree.split(self.shapes, self.mask)[0], hooks.rescaling)
        return hooks.optimizer(plain, steps) if hooks.optimizer else plain

    def loss(self, params: PyTree, batch: Batch, rng: jax.Array | None, regularizer: jax.Array | None = None) -> Sums:
        """The objective's sums over a batch, with the method's `bind` applied to the parameters.

        `regularizer` is the scale of the method's regularizer; None leaves the regularizer out. The derivative of
        the sum with respect to the scale is the value of the regularizer, times the sum of weights.
        """
        info = self.objective.batch_info(batch)
        params = self.method.bind(params, info, rng) if self.method.bind else params
        total_loss = lambda params: self.objective.loss(self.network, params, batch, self.logits_chunk_tokens)  # noqa: E731
        regularize = self.method.hooks.regularizer
        if regularizer is None or regularize is None:
            return total_loss(params)
        return regularize(total_loss, params, info, regularizer)

    def _loss_at_start(self, params: PyTree, batch: Batch, rng: jax.Array | None) -> Sums:
        """`loss` of parameters that are the run's start themselves."""
        start = jax.lax.stop_gradient(params)
        return self.loss(params, self.compared(start, start, batch, adds_reference=True), rng)

    @property
    def copied(self) -> bool:
        """Whether the loss compares with a copy of the trained leaves at their start."""
        return self.objective.comparison is not None and self.objective.comparison.reference == COPIED

    def compared(self, params: PyTree, start: PyTree, batch: Batch, adds_reference: bool) -> Batch:
        """The batch with what the objective takes from all of its rows, without a gradient.

        `start` are the parameters at the start of the run, and None where the batch holds their values. Dropout is off.
        """
        if not (comparison := self.objective.comparison):
            return batch

        def observe(batch: Batch, of_start: bool = False) -> jax.Array:
            one = functools.partial(self._row_values, start if of_start else params)
            return jax.lax.stop_gradient(step.map_microbatches(one, batch, self.optim.accumulate))

        if comparison.reference and adds_reference:
            batch = {**batch, REFERENCE: observe(batch, of_start=True)}
        return {**batch, **comparison.prepare(observe, batch)}

    def _row_values(self, params: PyTree, batch: Batch) -> jax.Array:
        assert self.objective.comparison is not None
        params = self.method.bind(params, self.objective.batch_info(batch), None) if self.method.bind else params
        return self.objective.comparison.row_values(self.network, params, batch, self.logits_chunk_tokens)

    def step(self, optimizer: optax.GradientTransformation) -> Any:
        """The training step, which `step.compile_step` compiles."""
        seed, accumulate = self.config.seed, self.optim.accumulate
        prepare = functools.partial(self.compared, adds_reference=self.copied) if self.objective.comparison else None
        return step.make_step(
            self.loss, optimizer, seed=seed, accumulate=accumulate, factors=self.loss_factors, prepare=prepare
        )

    @property
    def loss_factors(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """The further arguments of `loss` in a training step: their values at a step."""
        hooks, steps = self.method.hooks, self.config.steps
        at_step = hooks.regularizer_scale or (lambda step, steps: jnp.float32(1))
        return {"regularizer": lambda step: at_step(step, steps)} if hooks.regularizer else {}

    @functools.cached_property
    def learning_rates(self) -> np.ndarray:
        """`[steps]`: the learning rate of each step."""
        rates, change = optim.learning_rates(self.optim, self.config.steps), self.method.hooks.learning_rates
        return change(rates) if change else rates


def _refuse_loss(params: PyTree, batch: Batch) -> Sums:
    raise UserError(
        "the method starts from gradients of the first batches, which hold prompts without texts: choose another start"
    )


def _key() -> jax.Array:
    return jax.random.key(0)


def _bases_changed(before: PyTree, after: PyTree) -> bool:
    """Whether the plain base of a form is another array than the leaf that the form replaced."""
    forms = {name: w for name, w in tree.named_leaves(after, weight.is_weight) if weight.is_weight(w)}
    plain = dict(tree.named_leaves(before))
    bases = {name: getattr(w, "base", None) for name, w in forms.items()}
    return any(base is not plain[name] for name, base in bases.items() if isinstance(base, jax.Array))
