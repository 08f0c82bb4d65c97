"""What a method is: a setting of knobs. It says what it changes in a run; the run knows no method."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax

from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import Batch, Bind, PyTree
from lowrank.methods import targets

SHARED = "shared"  # the root of leaves that no single weight owns


@dataclasses.dataclass(frozen=True)
class Context:
    """What `Method.prepare` may look at: the run's data, its loss, its tokenizer."""

    key: jax.Array
    tokenizer: Any
    batches: Callable[[int], Sequence[Batch]]  # n -> the first n training batches; training still starts at the first
    loss: Callable[[PyTree, Batch], tuple[jax.Array, jax.Array]]  # (params, batch) -> (sum, weight)
    mask: PyTree  # which leaves are trained
    model: Any = None  # the model's config


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method changes. The first four knobs do for most: weights, model options, labels, run-time sharing."""

    rewrite: tuple[tuple[str, weight.Rewrite], ...] = ()  # (regex over weight names, function), applied in order
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options of the model's config
    train: tuple[str, ...] = ()  # regexes over leaf names, beside the fields that forms declare trainable
    bind: Bind | None = None  # (params, batch, rng or None) -> params, inside the loss
    freeze: tuple[str, ...] = ()  # regexes over leaves that are kept all the same
    by_layer: tuple[tuple[str, str], ...] = ()  # (target, pattern): every pattern must name a targeted layer
    share: Callable[[PyTree, jax.Array], PyTree] | None = None  # (base, key) -> leaves under `shared/`
    prepare: Callable[[PyTree, Context], PyTree] | None = None  # (params, context) -> params, once, before step 1
    penalty: Callable[[PyTree], jax.Array] | None = None  # (bound params) -> whose gradient is added to the mean loss's
    holdout: float = 0.0  # the share of training records that every other batch is of (`DataConfig.holdout`)
    # (k, (params, key) -> params), before steps k, 2k, ... from 0 (k below 1: a share of the run's steps); what it
    # changes of the frozen leaves is saved
    restart: tuple[float, Callable[[PyTree, jax.Array], PyTree]] | None = None
    # (the run's optimizer, its number of steps) -> this method's, inside the trained tree; it passes `lr` on
    optimizer: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] | None = None
    # (network, frozen leaves) -> (a host's batch -> what the loss gets in its place), made once, before step 1
    inputs: Callable[[Any, PyTree], Callable[[Batch], Batch]] | None = None
    holds: tuple[str, ...] = ()  # regexes over frozen leaves that an adapter holds too: what prepare or bind makes
    expands: bool = False  # bind makes leaves of the shared ones, and an adapter holds those in their place


def attach(method: Method, params: PyTree, key: jax.Array) -> PyTree:
    """`params` with the method's rewrites and shared leaves.

    Raises UserError for a pattern that matches nothing, and for a weight that two rewrites claim.
    """
    weights = tree.named_leaves(params, weight.is_weight)
    _claimed((p for p, _ in method.rewrite), [name for name, _ in weights])
    for target, pattern in method.by_layer:
        hits = tree.matching(target, [name for name, _ in weights], "target")
        layers = [n for name, w in weights if name in hits for n in targets.layer_names(name, w.shape)]
        tree.matching(pattern, layers, "rank or alpha pattern")
    adapted = weight.rewrite(params, method.rewrite, key)
    if not method.share:
        return adapted
    if SHARED in params:
        raise UserError(f"the parameters already have leaves under {SHARED}/: attach one such method")
    return {**adapted, SHARED: method.share(params, weight.name_key(key, SHARED))}


def _claimed(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises UserError for a weight that two rewrites of one method match: what they make has no order of its own."""
    owner: dict[str, str] = {}
    for pattern in patterns:
        for name in tree.matching(pattern, names, "target"):
            if owner.setdefault(name, pattern) != pattern:
                raise UserError(f"{name} is claimed by two rules of the method: {owner[name]!r} and {pattern!r}")


def restart_every(every: float, steps: int) -> int:
    """The number of steps between two restarts in a run of `steps`; see `Method.restart`."""
    return max(1, targets.steps(every, steps))


def trainable_mask(method: Method, params: PyTree, extra: Sequence[str] = ()) -> PyTree:
    """A tree of bools over the adapted `params`: what forms declare and `train` and `extra` name, less `freeze`.

    Raises UserError for a leaf that one pattern wants trained and another, or its form, kept.
    """
    names, patterns = tree.names(params), (*method.train, *extra)
    mask = weight.declared_mask(params, patterns)
    kept = {n: p for p in method.freeze for n in tree.matching(p, names, "freeze pattern")}
    for pattern in patterns:
        for name in kept.keys() & set(tree.matching(pattern, names, "train pattern")):
            raise UserError(f"{name} is claimed by {pattern!r}, to be trained, and by {kept[name]!r}, to be kept")
    return tree.map_named(lambda name, learns: learns and name not in kept, mask)


def finished(method: Method, params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """The trained `params` as an adapter holds them, and which of their leaves it holds."""
    if method.expands:
        bound = jax.jit(lambda params: method.bind(params, None, None))(params)
        params = {name: part for name, part in bound.items() if name != SHARED}
        mask = {name: part for name, part in mask.items() if name != SHARED}
    held = {n for p in method.holds for n in tree.matching(p, tree.names(params), "held leaf")}
    return params, tree.map_named(lambda name, learns: learns or name in held, mask)


def stripped(method: Method) -> Method:
    """The method as it is attached for an adapter to be loaded: what training alone needs is left out."""
    return dataclasses.replace(method, share=None) if method.expands else method


def matches(method: Method, params: PyTree) -> list[tuple[str, list[str]]]:
    """`[(pattern, weight or leaf names), ...]`: what each rule of the method matches in `params`."""
    weights, leaves = tree.names(params, weight.is_weight), tree.names(params)
    rules = [(p, tree.matching(p, weights, "target")) for p, _ in method.rewrite]
    return rules + [(p, tree.matching(p, leaves, "train pattern")) for p in method.train]
