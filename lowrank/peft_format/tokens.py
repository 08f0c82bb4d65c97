"""Trainable token rows in PEFT's format: `<embedding>.trainable_tokens_delta` `[n, D]`, which holds values.

Where the head shares the embedding the file has the same rows again under the head's name.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank import tree
from lowrank.errors import UserError, nearest
from lowrank.peft_format import config as configs
from lowrank.peft_format import match, tensors
from lowrank.peft_format.config import Content
from lowrank.peft_format.modules import Base, modules
from lowrank.weight import is_weight
from lowrank.weights.rows import Rows

PyTree = Any
TYPE, TABLE, SUFFIX, HEAD = "TRAINABLE_TOKENS", "embed/embedding", ".trainable_tokens_delta", "lm_head"
_KEYS = ("target_modules", "token_indices", "init_weights")


def fits(params: PyTree) -> bool:
    """Whether there is something to write in this form."""
    return isinstance(params.get("embed", {}).get("embedding"), Rows)


def model_options(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The base is loaded as it is."""
    del config, shapes
    return {}


def load(directory: str | os.PathLike[str], params: PyTree, base: Base, *, any_base: bool = False) -> PyTree:
    """`params`, the plain tree of `base`, with the rows in `directory`. Raises UserError for what does not fit."""
    path, config = Path(directory) / configs.NAME, configs.parse(directory)
    for key, value in config.items():
        if value and key not in (*configs.ABOUT, *_KEYS):
            raise UserError(f"{path}: {key}={value!r} is not supported{nearest(key, _KEYS)}")
    configs.check_base(config, base.name, directory, any_base)
    module, table = _path(base), params["embed"]["embedding"]
    wanted = config.get("target_modules")
    if wanted and not match.named(wanted, module):
        raise UserError(f"{path}: target_modules={wanted!r} is not supported; the base's embedding is {module!r}")
    ids = config.get("token_indices") or []
    if not ids or len(set(ids)) != len(ids) or not all(0 <= i < table.shape[0] for i in ids):
        raise UserError(f"{path}: token_indices {ids} are not distinct ids of the vocabulary of {table.shape[0]}")
    found = tensors.read(directory)
    own, copy = (f"{tensors.PREFIX}{name}{SUFFIX}" for name in (module, HEAD))
    shape = (len(ids), table.shape[1])
    tensors.check(directory, found, dict.fromkeys([own, copy] if _shared(base) and copy in found else [own], shape))
    if copy in found and not np.array_equal(found[copy], found[own]):
        raise UserError(f"{directory}: the rows of {HEAD} differ from those of {module}, which it shares")
    rows = Rows(base=table, ids=jnp.array(ids, jnp.int32), rows=jnp.asarray(found[own]))
    return {**params, "embed": {**params["embed"], "embedding": rows}}


def content(
    params: PyTree, base: Base, trained: Iterable[str], method: Mapping[str, Any], original: PyTree | None
) -> Content:
    """The JSON and the tensors of the token rows in `params`. UserError for what else they hold."""
    del method, original
    forms = [name for name, w in tree.named_leaves(params, is_weight) if is_weight(w)]
    rest = {*trained, *getattr(base, "new", ()), *forms} - {TABLE, f"{TABLE}/rows", f"{TABLE}/ids"}
    if rest:
        raise UserError(f"PEFT's {TYPE} has no place for {min(rest)}")
    table, module = params["embed"]["embedding"], _path(base)
    if is_weight(table.base):
        raise UserError(f"{TABLE} is a Rows on a {type(table.base).__name__}; PEFT has one form a layer")
    rows, ids = tensors.on_host(table.rows), tensors.on_host(table.ids).astype(int).tolist()
    arrays = {f"{tensors.PREFIX}{name}{SUFFIX}": rows for name in (module, *([HEAD] if _shared(base) else []))}
    summary = {
        **configs.about(TYPE, base),
        "init_weights": True,
        "target_modules": module,
        "token_indices": ids,
    }
    return summary, arrays


def _path(base: Base) -> str:
    """The embedding's module."""
    return next(path for path, m in modules(base).items() if m.weight and m.weight.leaf == TABLE)


def _shared(base: Base) -> bool:
    return getattr(base.config, "tied", False) and not base.config.num_labels
