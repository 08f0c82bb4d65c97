"""A config becomes a checked plan: all that can be wrong is found before a weight is read or anything is computed."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lowrank import counts, data, losses, methods, models, optim, pretrained, settings, sharding, step, tree, weight
from lowrank.errors import UserError
from lowrank.methods import Method
from lowrank.optim import OptimConfig
from lowrank.paging import HOST, has_host
from lowrank.scoring import EvalConfig, Scorer

PyTree = Any
Group = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The top level of a config. A group's keys are those of the dataclass or function that reads it."""

    steps: int
    model: Group  # name, param_dtype, and options of the model's config: dtype, remat, ...
    method: Group  # name, and the keywords of that function in `methods`
    data: Group  # data.DataConfig; the objective is this level's
    optim: Group = dataclasses.field(default_factory=dict)  # optim.OptimConfig
    eval: Group = dataclasses.field(default_factory=dict)  # scoring.EvalConfig
    mesh: Group = dataclasses.field(default_factory=dict)  # sharding.make_mesh
    checkpoint: Group = dataclasses.field(default_factory=dict)  # checkpoint.Checkpointer
    objective: str = "causal_lm"  # a key of losses.OBJECTIVES
    seed: int = 0
    loss_rows: int = 1024  # tokens a device whose logits exist at a time; 0: all of the batch's
    log_every: int = 10  # steps
    distributed: bool = False  # the launcher calls jax.distributed.initialize() first


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
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise UserError(f"checkpoint.every={self.every} must be >= 0 and checkpoint.keep={self.keep} must be >= 1")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run. `shapes` and `mask` are the adapted parameters: their shapes, and which of them are trained."""

    config: RunConfig
    method: Method
    model: ModelConfig
    options: dict[str, Any]  # of the model's config, the method's among them
    network: Any
    optim: OptimConfig
    checkpoint: CheckpointConfig
    loader: data.Loader
    scorer: Scorer | None
    mesh: Mesh
    shapes: PyTree
    mask: PyTree
    table: str  # what every rule matched, and how much of the model is trained
    tokens_per_step: float
    tokenizer: Any
    notes: tuple[str, ...] = ()  # what the devices lack, and what is done instead

    @property
    def paged(self) -> bool:
        """Whether the optimizer's state lies on the host: asked for, and there is memory for it."""
        return self.optim.paged and has_host(self.mesh)

    def load(self) -> pretrained.Pretrained:
        """The base, each leaf where the mesh wants it."""
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
        """`(params with the method's rewrites, the ones before)`: what is trained in float32, all on the mesh.

        The ones before are None unless a rewrite changed a base (PiSSA); else they are the same arrays.
        """
        where = sharding.shardings(self.shapes, self.mesh)
        attach = functools.partial(methods.attach, self.method, key=jax.random.key(self.config.seed))
        adapted = _computing(attach, where, params)(params)
        changed = _bases_changed(params, adapted)
        adapted = jax.tree.map(lambda x, learns: x.astype("float32") if learns else x, adapted, self.mask)
        return jax.device_put(adapted, where), params if changed else None

    def prepare(self, params: PyTree) -> PyTree:
        """The adapted parameters after the method has looked at the data; each leaf keeps its shape and place."""
        if not self.method.prepare:
            return params
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        loss = functools.partial(self.loss, rng=None)
        context = methods.Context(key, self.tokenizer, self._first_batches, loss, self.mask, self.network.config)
        return jax.device_put(self.method.prepare(params, context), sharding.shardings(self.shapes, self.mesh))

    def restarts_at(self, done: int) -> bool:
        """Whether the method restarts before step `done` (from 0)."""
        every = methods.restart_every(self.method.restart[0], self.config.steps) if self.method.restart else 0
        return bool(every) and done > 0 and done % every == 0

    def restart(self, params: PyTree, done: int) -> PyTree:
        """The parameters that step `done` (from 0) starts from where the method restarts."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), 2), done)
        return self._restarted(params, key)

    @functools.cached_property
    def _restarted(self) -> Callable[[PyTree, jax.Array], PyTree]:
        return _computing(self.method.restart[1], sharding.shardings(self.shapes, self.mesh), self.shapes, _key())

    @functools.cached_property
    def changing(self) -> frozenset[str]:
        """The names of the frozen leaves that a checkpoint holds: `prepare` has chosen, or restarts change them."""
        frozen = tree.names(tree.split(self.shapes, self.mask)[1])
        patterns = self.method.holds if self.method.prepare else ()
        return self._changed_by_restarts() | {n for p in patterns for n in frozen if re.fullmatch(p, n)}

    def _changed_by_restarts(self) -> frozenset[str]:
        if not self.method.restart:
            return frozenset()
        _, sources = _sources(self.method.restart[1], self.shapes, _key())
        learns = jax.tree.leaves(self.mask)
        names = enumerate(tree.names(self.shapes))
        return frozenset(name for i, name in names if sources[i] != i and not learns[i])

    def _first_batches(self, n: int) -> list[losses.Batch]:
        start = self.loader.get_state()
        batches = [sharding.global_batch(batch, self.mesh) for batch in itertools.islice(self.loader, n)]
        self.loader.set_state(start)
        return batches

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the trained leaves."""
        plain = optim.make(self.optim, self.config.steps, tree.split(self.shapes, self.mask)[0])
        return self.method.optimizer(plain, self.config.steps) if self.method.optimizer else plain

    def loss(self, params: PyTree, batch: losses.Batch, rng: jax.Array | None) -> losses.Sums:
        """`(sum of weighted losses, sum of weights)`.

        A method's penalty adds its gradient in proportion to the weights, and nothing to the sum: losses compare.
        """
        rows = self.config.loss_rows * self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        params = self.method.bind(params, batch, rng) if self.method.bind else params
        total, weight = losses.objective(self.config.objective)(self.network, params, batch, rows)
        if self.method.penalty:
            added = self.method.penalty(params)
            total += weight * (added - jax.lax.stop_gradient(added))
        return total, weight

    def step(self, optimizer: optax.GradientTransformation) -> Any:
        """The training step, ready for `step.compile`."""
        schedule = optim.schedule(self.optim, self.config.steps)
        return step.make(self.loss, optimizer, schedule, seed=self.config.seed, accumulate=self.optim.accumulate)


def make(config: Group, devices: Sequence[Any] | None = None, like: Plan | None = None) -> Plan:
    """Checks a config (a ConfigDict or nested dicts) against the model, the data and the mesh. Raises UserError.

    `devices` are the mesh's if they are not this machine's: such a plan is only compiled. `like` is a plan of the same
    data, whose loader and scorer serve again.
    """
    c = settings.call(RunConfig, config, "config")
    _check_numbers(c)
    losses.objective(c.objective)
    method = methods.build(c.method)
    optim_config = settings.call(OptimConfig, c.optim, "optim")
    optim.check(optim_config, c.steps)
    saved = settings.call(CheckpointConfig, c.checkpoint, "checkpoint")
    asked = {"objective": c.objective} | ({"holdout": method.holdout} if method.holdout else {})
    data_config = settings.call(data.DataConfig, {**c.data, **asked}, "data")
    make_mesh = sharding.make_mesh if devices is None else functools.partial(sharding.mesh_of, devices)
    mesh = settings.call(make_mesh, c.mesh, "mesh")
    sharding.check_batch(data_config.batch_size, optim_config.accumulate, mesh)
    own = [f.name for f in dataclasses.fields(ModelConfig)]
    model = settings.call(ModelConfig, {k: v for k, v in c.model.items() if k in own}, "model")
    options = {k: v for k, v in c.model.items() if k not in own} | dict(method.model)
    read = {"param_dtype": model.param_dtype, "quantized": model.quantize, "upcycled": model.upcycle}
    shape, tokenizer, base = pretrained.describe(model.name, options, **read)
    if c.objective == "causal_lm" and not isinstance(shape, models.DecoderConfig):
        raise UserError(f"{model.name} is an encoder: it is fine-tuned with objective=classification")
    room, length = shape.room - shape.virtual, f"data.seq_len={data_config.seq_len}"
    if shape.virtual and data_config.seq_len > room:
        raise UserError(f"{length} and {shape.virtual} virtual tokens exceed the model's {shape.room} positions")
    read_data = functools.partial(data.make_loader, data_config, tokenizer)
    loader = like.loader if like else read_data(jax.process_index(), jax.process_count(), room)
    if loader.labels:
        options["num_labels"] = len(loader.labels)
        shape, _, base = pretrained.describe(model.name, options, **read)
    shapes, mask, table = _split(method, base, bool(loader.labels))
    notes = _notes(optim_config, shape, mesh)
    sharding.shardings(shapes, mesh)
    if shape.remat == "offload" and not has_host(mesh):
        shape = dataclasses.replace(shape, remat="names", remat_names=shape.remat_names or ("input",))
    network = models.build(shape)
    eval_config = settings.call(EvalConfig, c.eval, "eval")
    used = models.build(models.after_training(shape))
    score = functools.partial(Scorer, eval_config, data_config, tokenizer, used, method.bind, mesh)
    plan = Plan(
        config=c,
        method=method,
        model=model,
        options=options,
        network=network,
        optim=optim_config,
        checkpoint=saved,
        loader=loader,
        scorer=like.scorer if like else score() if eval_config.split else None,
        mesh=mesh,
        shapes=shapes,
        mask=mask,
        table="\n".join([table, *notes]),
        tokens_per_step=_tokens_per_step(data_config, loader),
        tokenizer=tokenizer,
        notes=notes,
    )
    plan.optimizer()
    return plan


def _check_numbers(c: RunConfig) -> None:
    for key, least in (("steps", 1), ("log_every", 1), ("loss_rows", 0), ("seed", 0)):
        if getattr(c, key) < least:
            raise UserError(f"{key} must be at least {least}, not {getattr(c, key)}")


def _notes(config: OptimConfig, model: Any, mesh: Mesh) -> tuple[str, ...]:
    if has_host(mesh):
        return ()
    lack = f"{mesh.devices.flat[0].device_kind} has no {HOST} memory"
    stays = {"optim.paged": config.paged and "the optimizer's state stays", "model.remat=offload": ""}
    if model.remat == "offload":
        stays["model.remat=offload"] = "what would be offloaded stays"
    return tuple(f"warning: {key}: {lack}, so {what} in the device's" for key, what in stays.items() if what)


def _split(method: Method, base: PyTree, labelled: bool) -> tuple[PyTree, PyTree, str]:
    """`(shapes, mask, table)` of the adapted parameters; a classifier's head is new, so it is always trained."""
    method = dataclasses.replace(method, train=(*method.train, *(("head/.*",) if labelled else ())))
    shapes = jax.eval_shape(lambda params: methods.attach(method, params, jax.random.key(0)), base)
    mask = methods.trainable_mask(method, shapes)
    if not any(jax.tree.leaves(mask)):
        raise UserError("the method trains nothing")
    return shapes, mask, counts.rule_table(methods.matches(method, shapes), shapes, mask)


def _key() -> jax.Array:
    return jax.random.key(0)


def _sources(fn: Callable[..., PyTree], *args: PyTree) -> tuple[PyTree, list[int | None]]:
    """`(shapes of fn(*args), which leaf of args each of its leaves is)`, None for a leaf that is computed."""
    program, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    given = {id(var): i for i, var in enumerate(program.jaxpr.invars)}
    return shapes, [given.get(id(var)) for var in program.jaxpr.outvars]


def _computing(fn: Callable[..., PyTree], where: PyTree, *args: PyTree) -> Callable[..., PyTree]:
    """`fn` under jit for arguments like `args`; what it hands through stays the array it was, where jit would copy."""
    shapes, sources = _sources(fn, *args)

    def some(values: PyTree) -> list[Any]:
        return [x for x, source in zip(jax.tree.leaves(values), sources, strict=True) if source is None]

    made = jax.jit(lambda *args: some(fn(*args)), out_shardings=some(where))

    def compute(*args: PyTree) -> PyTree:
        given, fresh = jax.tree.leaves(args), iter(made(*args))
        leaves = [next(fresh) if source is None else given[source] for source in sources]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return compute


def _bases_changed(before: PyTree, after: PyTree) -> bool:
    """Whether a form's plain base is another array than the one it was made from."""
    forms = {name: w for name, w in tree.named_leaves(after, weight.is_weight) if weight.is_weight(w)}
    plain = dict(tree.named_leaves(before))
    bases = {name: getattr(w, "base", None) for name, w in forms.items()}
    return any(base is not plain[name] for name, base in bases.items() if isinstance(base, jax.Array))


def _tokens_per_step(config: data.DataConfig, loader: data.Loader) -> float:
    """Real tokens a step of all hosts: rows that are packed are nearly full, others are as long as their sequence."""
    mean = loader.stats["tokens"] / max(1, loader.stats["sequences"])
    packed = config.packing and not loader.labels
    return config.batch_size * (config.seq_len if packed else mean)
