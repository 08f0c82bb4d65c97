"""Trees by leaf name: names, patterns that must match, split and join, and flat dicts `{leaf name: leaf}`.

A leaf's name is its path joined by slashes, including the fields of forms: `layers/attn/q/kernel/a`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from lowrank.core.errors import UserError, nearest
from lowrank.core.typing import Arrays, PyTree

IsLeaf = Callable[[Any], bool] | None
STACKS = ("layers", "top")  # the subtrees whose leaves have a layer axis first


def path_name(path: Sequence[Any]) -> str:
    """The slash-joined name of a key path as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def stack_depth(name: str) -> int:
    """The number of leading axes of a leaf that index layers and experts, before the axes of one vector or kernel."""
    root, *parts = name.split("/")
    experts = parts[:2] == ["mlp", "experts"] or (parts[:2] == ["mlp", "routed"] and parts[2:3] != ["router"])
    return (root in (*STACKS, "prefix")) * (1 + experts)


def named_leaves(tree: PyTree, is_leaf: IsLeaf = None) -> list[tuple[str, Any]]:
    """`[(name, leaf), ...]` in leaf order."""
    return [(path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def leaf_names(tree: PyTree, is_leaf: IsLeaf = None) -> list[str]:
    """The leaf names in leaf order."""
    return [name for name, _ in named_leaves(tree, is_leaf)]


def map_named(fn: Callable[..., Any], tree: PyTree, *rest: PyTree, is_leaf: IsLeaf = None) -> PyTree:
    """`jax.tree.map` with a function `fn(name, *leaves)` that gets the leaf's name first."""
    return jax.tree_util.tree_map_with_path(lambda p, *leaves: fn(path_name(p), *leaves), tree, *rest, is_leaf=is_leaf)


def match_names(pattern: str, candidates: Iterable[str], what: str = "pattern") -> list[str]:
    """The names that `pattern` matches in full.

    Raises UserError for a pattern that is not a regular expression, and for one that matches no name.
    """
    candidates, regex = list(candidates), compile_regex(pattern, what)
    matches = [name for name in candidates if regex.fullmatch(name)]
    if not matches:
        raise UserError(f"{what} {pattern!r} matches no leaf{nearest(pattern, candidates)}")
    return matches


def compile_regex(pattern: str, what: str = "pattern") -> re.Pattern[str]:
    """`pattern` as a compiled regular expression. Raises UserError if it is not one."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"{what} {pattern!r} is not a regular expression: {e}") from None


def first_match(rules: Sequence[tuple[str, Any]], name: str) -> Any:
    """The value of the first rule whose regex matches `name` in full. Raises UserError if no rule does."""
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise UserError(f"no rule covers leaf {name!r}{nearest(name, [p for p, _ in rules])}")


def pattern_mask(tree: PyTree, patterns: Iterable[str], what: str = "pattern") -> PyTree:
    """A tree of bools: True where a pattern matches the leaf's name. Raises UserError for a pattern without a match."""
    names = leaf_names(tree)
    chosen = {name for pattern in patterns for name in match_names(pattern, names, what)}
    return map_named(lambda name, _: name in chosen, tree)


def split(tree: PyTree, where: PyTree) -> tuple[PyTree, PyTree]:
    """`(leaves where True, leaves where False)`: two trees of the same structure, each with None for the other's."""
    chosen = jax.tree.map(lambda keep, leaf: leaf if keep else None, where, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, where, tree)
    return chosen, rest


def join(chosen: PyTree, rest: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda x: x is None)


def flatten_named(values: PyTree) -> Arrays:
    """`{leaf name: leaf}` of any pytree, such as an optax state. Raises UserError if two leaves have one name."""
    flat: Arrays = {}
    for name, leaf in named_leaves(values):
        if name in flat:
            raise UserError(f"two leaves have the name {name!r}, and a checkpoint needs unique names: rename one")
        flat[name] = leaf
    return flat


def unflatten_named(like: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """A tree with the structure of `like` and the leaves of `flat`, the inverse of `flatten_named`.

    Raises UserError unless `flat` has exactly the names of `like`.
    """
    wanted = flatten_named(like)
    check_same_names(wanted, flat, "the tree")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in wanted])


def check_same_names(wanted: Mapping[str, Any], stored: Iterable[str], where: str) -> None:
    """Raises UserError, with the nearest name, if `stored` lacks a name of `wanted` or has one that is not in it."""
    stored = list(stored)
    for name in wanted:
        if name not in stored:
            raise UserError(f"leaf {name!r} is missing from {where}{nearest(name, set(stored) - set(wanted))}")
    for name in stored:
        if name not in wanted:
            raise UserError(f"leaf {name!r} of {where} is not one of this run{nearest(name, wanted)}")
