"""Whole embeddings and heads of an adapter, on bases whose head is their embedding and on all others, as PEFT has them.

PEFT adapts or saves the head of a tied base as a module of its own, and the embedding stays. An embedding that
`modules_to_save` lists is a copy too, and the head keeps the base's; one that it does not list is that of the base.
"""

import dataclasses
import types
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match, tensors
from lowrank.adapters.peft.modules import Base, Module, Place, base_modules
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight, materialize

TABLE, HEAD = "embed/embedding", "head/kernel"


def untied(config: Mapping[str, Any], found: Collection[str], params: PyTree, base: Base) -> tuple[PyTree, Base]:
    """`(params, base)` with a head of its own, if the base is tied and the adapter treats the two apart."""
    if not getattr(base.config, "tied", False) or base.config.num_labels:
        return params, base
    table = next(path for path, module in base_modules(base).items() if module.weight and module.weight.leaf == TABLE)
    copied = match.is_inside(config.get("modules_to_save") or (), table) and not config.get("ensure_weight_tying")
    if not copied and not any(key.startswith(f"{tensors.PREFIX}lm_head.") for key in found):
        return params, base
    view: Any = types.SimpleNamespace(
        config=dataclasses.replace(base.config, tied=False), family=base.family, name=base.name
    )
    return {**params, "head": {"kernel": materialize(params["embed"]["embedding"]).T}}, view


def tied_again(params: PyTree, base: Base) -> PyTree:
    """`params` without the head of a tied base where it is still, or again, its embedding."""
    head, table = params.get("head", {}).get("kernel"), params["embed"]["embedding"]
    if not getattr(base.config, "tied", False) or base.config.num_labels or head is None:
        return params
    if is_weight(head) or is_weight(table) or not jnp.array_equal(head, table.T):
        return params
    return {name: leaves for name, leaves in params.items() if name != "head"}


def unlisted(
    known: Mapping[str, Module], targets: Collection[str], found: Mapping[str, np.ndarray]
) -> dict[str, Place]:
    """The whole embeddings and heads among the tensors, which PEFT writes without listing them."""
    modules = {path: m for path, m in known.items() if m.weight and m.weight.leaf in (TABLE, HEAD)}
    keys = {f"{tensors.PREFIX}{path}.weight": m.weight for path, m in modules.items() if path not in targets}
    return {key: place for key, place in keys.items() if key in found}


def resized(found: Mapping[str, np.ndarray], params: PyTree, base: Base, directory: Any) -> tuple[PyTree, Base]:
    """`(params, base)` with as many tokens as the whole embeddings of an adapter that added some.

    The adapter's tables take the place of all rows. Raises UserError where it holds one of two tables.
    """
    if base.config.num_labels or not hasattr(base.config, "tied"):
        return params, base
    paths = {
        m.weight.leaf: path for path, m in base_modules(base).items() if m.weight and m.weight.leaf in (TABLE, HEAD)
    }
    places = {
        f"{tensors.PREFIX}{path}{inner}.weight": leaf for leaf, path in paths.items() for inner in ("", ".base_layer")
    }
    rows = {leaf: (key, len(found[key])) for key, leaf in places.items() if key in found}
    most = max((size for _, size in rows.values()), default=0)
    if most <= base.config.vocab_size:
        return params, base
    for leaf, path in paths.items():
        if rows.get(leaf, ("", 0))[1] != most:
            key, size = next(row for row in rows.values() if row[1] == most)
            why = f"{key} has {plural(size, 'row')}, and the base has {base.config.vocab_size}"
            raise UserError(f"{directory}: {why}: save {path} too, whose tokens were added with them")
    table = params["embed"]["embedding"]
    if is_weight(table):
        raise UserError(f"{directory} adds tokens to an embedding that is a {type(table).__name__}: load it in full")
    more = most - base.config.vocab_size
    grown = {**params, "embed": {**params["embed"], "embedding": jnp.pad(table, ((0, more), (0, 0)))}}
    if HEAD in paths:
        head = materialize(params["head"]["kernel"])
        grown["head"] = {**params["head"], "kernel": jnp.pad(head, ((0, 0), (0, more)))}
    config = dataclasses.replace(base.config, vocab_size=most)
    view: Any = types.SimpleNamespace(config=config, family=base.family, name=base.name)
    return grown, view
