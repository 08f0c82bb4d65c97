"""Whole embeddings and heads of an adapter, on bases whose head is their embedding and on all others, as PEFT has them.

PEFT adapts or saves the head of a tied base as a module of its own, and the embedding stays. An embedding that
`modules_to_save` lists is a copy too, and the head keeps the base's; one that it does not list is that of the base.
"""

import dataclasses
import types
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match, tensors
from lowrank.adapters.peft.modules import TABLE, Base, Module, Place, base_modules
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_weight, materialize
from lowrank.weights.lora import LoRA

HEAD, HEAD_PATH = "head/kernel", "lm_head"


def untied(
    config: Mapping[str, Any], found: Collection[str], params: PyTree, base: Base
) -> tuple[dict[str, Any], PyTree, Base]:
    """`(config, params, base)` with a head of its own, if the base is tied and the adapter treats the two apart.

    With `ensure_weight_tying`, PEFT adapts the head of an adapted embedding too, without naming it.
    """
    if not _tied(base):
        return dict(config), params, base
    table, tying = _table(base), config.get("ensure_weight_tying")
    copied = match.is_inside(config.get("modules_to_save") or (), table) and not tying
    adapted = any(key.startswith(f"{tensors.PREFIX}{table}.lora_") for key in found)
    if not (copied or adapted or any(key.startswith(f"{tensors.PREFIX}{HEAD_PATH}.") for key in found)):
        return dict(config), params, base
    wanted = config.get("target_modules")
    if adapted and tying and wanted:
        both = rf"(?:{wanted})|{HEAD_PATH}" if isinstance(wanted, str) else [*wanted, HEAD_PATH]
        config = {**config, "target_modules": both}
    return dict(config), _with_head(params, materialize(params["embed"]["embedding"]).T), _view(base, tied=False)


def tied_again(config: Mapping[str, Any], params: PyTree, base: Base, directory: Any) -> PyTree:
    """`params` without the head of a tied base where it is still, or again, its embedding.

    Raises UserError for factors of the two that differ, although `ensure_weight_tying` promises that they are alike.
    """
    head, table = params.get("head", {}).get("kernel"), params["embed"]["embedding"]
    if not _tied(base) or head is None:
        return params
    if type(head) is type(table) is LoRA:
        alike = all(map(jnp.array_equal, jax.tree.leaves(head), jax.tree.leaves(_transposed(table))))
        if config.get("ensure_weight_tying") and not alike:
            why = "its ensure_weight_tying promises that they are the same"
            raise UserError(f"{directory}: the factors of {HEAD_PATH} are not those of {_table(base)}: {why}")
    else:
        alike = not is_weight(head) and not is_weight(table) and bool(jnp.array_equal(head, table.T))
    return {name: leaves for name, leaves in params.items() if name != "head"} if alike else params


def apart(params: PyTree, base: Base) -> tuple[PyTree, Base, dict[str, Any]]:
    """`(params, base, keys of the JSON)` in which a tied base has the head that PEFT has an adapter for.

    A LoRA on an embedding that is the head too is one on each of them in PEFT, and `ensure_weight_tying` says so.
    """
    if not _tied(base):
        return params, base, {}
    table = params.get("embed", {}).get("embedding")
    if type(table) is not LoRA or "head" in params:
        return params, _view(base, tied=False) if "head" in params else base, {}
    return _with_head(params, _transposed(table)), _view(base, tied=False), {"ensure_weight_tying": True}


def _tied(base: Base) -> bool:
    return bool(getattr(base.config, "tied", False)) and not base.config.num_labels


def _table(base: Base) -> str:
    """The path of the embedding's module."""
    return next(path for path, module in base_modules(base).items() if module.embedding)


def _view(base: Base, **changes: Any) -> Any:
    """The base with another config."""
    config = dataclasses.replace(base.config, **changes)
    more = {field: getattr(base, field) for field in ("new", "quantized") if hasattr(base, field)}
    return types.SimpleNamespace(config=config, family=base.family, name=base.name, **more)


def _with_head(params: PyTree, kernel: Any) -> PyTree:
    return {**params, "head": {"kernel": kernel}}


def _transposed(table: LoRA) -> LoRA:
    """The LoRA on the head whose kernel is the transpose of an embedding."""
    return dataclasses.replace(table, base=materialize(table.base).T, a=table.b.T, b=table.a.T)


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
    return grown, _view(base, vocab_size=most)
