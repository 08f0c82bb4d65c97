"""Trees as {leaf name: leaf}, and back, strictly."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from lowrank import tree
from lowrank.errors import UserError, nearest

PyTree = Any
Arrays = dict[str, jax.Array]


def flatten_named(values: PyTree) -> Arrays:
    """`{leaf name: leaf}` of any pytree (an optax state too). Two leaves of one name raise UserError."""
    flat: Arrays = {}
    for name, leaf in tree.named_leaves(values):
        if name in flat:
            raise UserError(f"two leaves are called {name!r}: rename one, a checkpoint needs unique names")
        flat[name] = leaf
    return flat


def unflatten_named(like: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """The tree of `like`'s structure with the leaves of `flat`: the inverse of `flatten_named`, strict about names."""
    wanted = flatten_named(like)
    same_names(wanted, flat, "the tree")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in wanted])


def same_names(wanted: Mapping[str, Any], found: Iterable[str], where: str) -> None:
    """Raises UserError, with the nearest name, where `found` lacks a name of `wanted` or has another one."""
    found = list(found)
    for name in wanted:
        if name not in found:
            raise UserError(f"leaf {name!r} is missing from {where}{nearest(name, set(found) - set(wanted))}")
    for name in found:
        if name not in wanted:
            raise UserError(f"leaf {name!r} of {where} is not one of this run{nearest(name, wanted)}")
