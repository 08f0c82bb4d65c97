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


def check_rows(found: Mapping[str, np.ndarray], places: Mapping[str, Place], vocab_size: int, directory: Any) -> None:
    """Raises UserError for a whole embedding or head with more rows than the base."""
    for key, place in places.items():
        if place.leaf in (TABLE, HEAD) and key in found and len(found[key]) > vocab_size:
            rows = f"{plural(len(found[key]), 'row')}, and the base has {vocab_size}"
            advice = "its tokens were added: resize the base's embedding as they were, and name that base"
            raise UserError(f"{directory}: {key} has {rows}: {advice}")
