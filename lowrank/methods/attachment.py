"""A method applied to parameters: the adapted tree, its trained leaves, and the leaves that an adapter saves."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from lowrank.core import tree, weight
from lowrank.core.errors import UserError
from lowrank.core.typing import PyTree
from lowrank.methods import targets
from lowrank.methods.method import SHARED, Method


def attach(method: Method, params: PyTree, key: jax.Array) -> PyTree:
    """`params` after the method's rules, with its shared leaves.

    Raises UserError for a pattern that matches nothing, and for a weight that two rules match.
    """
    weights = tree.named_leaves(params, weight.is_weight)
    _check_one_rule_each((p for p, _ in method.rules), [name for name, _ in weights])
    for target, pattern in method.hooks.by_layer:
        hits = tree.match_names(target, [name for name, _ in weights], "target")
        layers = [n for name, w in weights if name in hits for n in targets.layer_names(name, w.shape)]
        tree.match_names(pattern, layers, "rank or alpha pattern")
    adapted = weight.rewrite(params, method.rules, key)
    if not method.init_shared:
        return adapted
    if SHARED in params:
        raise UserError(f"the parameters already have leaves under {SHARED}/: attach one such method")
    return {**adapted, SHARED: method.init_shared(params, weight.name_key(key, SHARED))}


def attach_for_loading(method: Method, params: PyTree) -> PyTree:
    """`params` as `attach` makes them, for an adapter's leaves to be loaded into; see `Export.bound`."""
    if method.export.bound:
        method = dataclasses.replace(method, init_shared=None)
    return attach(method, params, jax.random.key(0))


def _check_one_rule_each(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises UserError for a weight that two rules of one method match: their order would decide the result."""
    owner: dict[str, str] = {}
    for pattern in patterns:
        for name in tree.match_names(pattern, names, "target"):
            if owner.setdefault(name, pattern) != pattern:
                raise UserError(f"{name} is claimed by two rules of the method: {owner[name]!r} and {pattern!r}")


def trainable_mask(method: Method, params: PyTree, extra: Sequence[str] = ()) -> PyTree:
    """A tree of bools over the adapted `params`, true where a leaf is trained.

    Forms declare their trained fields, the regexes `Method.trainable` and `extra` add leaves, and `Hooks.freeze` takes
    some away. Raises UserError for a leaf that one pattern trains and that another pattern, or its form, freezes.
    """
    names, patterns = tree.leaf_names(params), (*method.trainable, *extra)
    mask = weight.declared_mask(params, patterns)
    frozen = {n: p for p in method.hooks.freeze for n in tree.match_names(p, names, "freeze pattern")}
    for pattern in patterns:
        for name in frozen.keys() & set(tree.match_names(pattern, names, "train pattern")):
            raise UserError(f"{name} is claimed by {pattern!r}, to be trained, and by {frozen[name]!r}, to be kept")
    return tree.map_named(lambda name, learns: learns and name not in frozen, mask)


def exported_leaves(method: Method, params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """`(params, mask)` of an adapter: the trained `params` as it saves them, and a mask of the leaves that it saves."""
    if method.export.bound:
        bind = method.bind
        assert bind is not None  # `bound` promises it
        bound = jax.jit(lambda params: bind(params, None, None))(params)
        params = {name: part for name, part in bound.items() if name != SHARED}
        mask = {name: part for name, part in mask.items() if name != SHARED}
    saved = {n for p in method.export.frozen for n in tree.match_names(p, tree.leaf_names(params), "saved leaf")}
    return params, tree.map_named(lambda name, learns: learns or name in saved, mask)


def matches(method: Method, params: PyTree) -> list[tuple[str, list[str]]]:
    """`[(pattern, weight or leaf names), ...]`: the weights or leaves of `params` that each pattern matches."""
    weights, leaves = tree.leaf_names(params, weight.is_weight), tree.leaf_names(params)
    rules = [(p, tree.match_names(p, weights, "target")) for p, _ in method.rules]
    return rules + [(p, tree.match_names(p, leaves, "train pattern")) for p in method.trainable]
