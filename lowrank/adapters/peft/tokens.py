"""Trained token embeddings in PEFT's format: `<embedding>.trainable_tokens_delta` `[n, D]`, which holds values.

Where the head shares the embedding, the file repeats the rows under the head's name. Beside a LoRA the file has them
once, as `<embedding>.token_adapter.trainable_tokens_delta`, and the JSON has `trainable_token_indices`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import config as configs
from lowrank.adapters.peft import match, tensors
from lowrank.adapters.peft.config import Content
from lowrank.adapters.peft.modules import Base, base_modules
from lowrank.core import tree
from lowrank.core.errors import UserError, nearest
from lowrank.core.paths import AnyPath, PathLike, as_path
from lowrank.core.typing import PyTree
from lowrank.core.weight import is_stored, is_weight
from lowrank.weights.token_embeddings import TrainableTokens

TYPE, TABLE, SUFFIX, HEAD = "TRAINABLE_TOKENS", "embed/embedding", ".trainable_tokens_delta", "lm_head"
INDICES, INNER = "trainable_token_indices", ".token_adapter"  # for rows beside a LoRA
_KEYS = ("target_modules", "token_indices", "init_weights")


def can_write(params: PyTree) -> bool:
    """Whether `params` hold trained token embeddings."""
    return isinstance(params.get("embed", {}).get("embedding"), TrainableTokens)


def model_options(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """No model options: the base is loaded unchanged."""
    del config, shapes
    return {}


def load(directory: PathLike, params: PyTree, base: Base, *, any_base: bool = False) -> PyTree:
    """`params`, the plain tree of `base`, with the rows in `directory`. Raises UserError if they do not suit it."""
    path, config = as_path(directory) / configs.NAME, configs.parse_json(directory)
    for key, value in config.items():
        if value and key not in (*configs.ABOUT, *_KEYS):
            raise UserError(f"{path}: {key}={value!r} is not supported{nearest(key, _KEYS)}")
    configs.check_base(config, base.name, directory, any_base)
    module, table = _path(base), params["embed"]["embedding"]
    wanted = config.get("target_modules")
    if wanted and not match.is_named(wanted, module):
        raise UserError(f"{path}: target_modules={wanted!r} is not supported; the base's embedding is {module!r}")
    ids = _ids(path, "token_indices", config.get("token_indices"), table)
    found = tensors.read_tensors(directory)
    own, copy = (f"{tensors.PREFIX}{name}{SUFFIX}" for name in (module, HEAD))
    shape = (len(ids), table.shape[1])
    tensors.check_shapes(
        directory, found, dict.fromkeys([own, copy] if _shared(base) and copy in found else [own], shape)
    )
    if copy in found and not np.array_equal(found[copy], found[own]):
        raise UserError(f"{directory}: the rows of {HEAD} differ from those of {module}, which it shares")
    return insert_tokens(
        TrainableTokens(base=table, ids=jnp.array(ids, jnp.int32), rows=jnp.asarray(found[own])), params
    )


def _ids(path: AnyPath, key: str, ids: Any, table: Any) -> list[int]:
    if not ids or len(set(ids)) != len(ids) or not all(0 <= i < table.shape[0] for i in ids):
        raise UserError(f"{path}: {key} {ids} must be distinct ids below the vocabulary size {table.shape[0]}")
    return ids


def split_tokens(
    config: Mapping[str, Any],
    found: Mapping[str, np.ndarray],
    params: PyTree,
    base: Base,
    directory: PathLike,
) -> tuple[TrainableTokens | None, dict[str, np.ndarray]]:
    """`(the token rows of an adapter of weights, or None; its other tensors)`."""
    wanted, path = config.get(INDICES), as_path(directory) / configs.NAME
    if not wanted:
        return None, dict(found)
    module, table = _path(base), params["embed"]["embedding"]
    named = wanted if isinstance(wanted, Mapping) else {module: wanted}
    for name in named:
        if len(named) > 1 or not match.is_named([name], module):
            raise UserError(f"{path}: {INDICES} of {sorted(named)} is not supported; the embedding is {module!r}")
    ids = _ids(path, INDICES, next(iter(named.values())), table)
    key = f"{tensors.PREFIX}{module}{INNER}{SUFFIX}"
    own = {k: x for k, x in found.items() if k == key}
    tensors.check_shapes(directory, own, {key: (len(ids), table.shape[1])})
    rest = {k: x for k, x in found.items() if k != key}
    return TrainableTokens(base=table, ids=jnp.array(ids, jnp.int32), rows=jnp.asarray(own[key])), rest


def insert_tokens(rows: TrainableTokens | None, params: PyTree) -> PyTree:
    """`params` with the rows on their embedding; unchanged if `rows` is None."""
    return params if rows is None else {**params, "embed": {**params["embed"], "embedding": rows}}


def set_tokens_aside(params: PyTree, trained: Iterable[str]) -> tuple[TrainableTokens | None, PyTree, list[str]]:
    """`(rows, params, trained)`: the rows are taken out of the others if `params` have more adapted weights."""
    forms = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w) and not is_stored(w)]
    if not can_write(params) or len(forms) == 1:
        return None, params, list(trained)
    rows = params["embed"]["embedding"]
    plain = {**params, "embed": {**params["embed"], "embedding": rows.base}}
    return rows, plain, [name for name in trained if not name.startswith(f"{TABLE}/")]


def add_tokens(
    rows: TrainableTokens | None, base: Base, summary: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Content:
    """The JSON and the tensors of an adapter, with the rows added. Raises UserError for any type but LORA."""
    if rows is None:
        return summary, arrays
    if summary["peft_type"] != "LORA":
        raise UserError(f"a PEFT adapter of type {summary['peft_type']} cannot hold {TABLE}/rows: only LORA can")
    values, ids = _on_host(rows)
    summary = {**summary, INDICES: {_path(base): ids}}
    return summary, {**arrays, f"{tensors.PREFIX}{_path(base)}{INNER}{SUFFIX}": values}


def _on_host(table: TrainableTokens) -> tuple[np.ndarray, list[int]]:
    """`(values, ids)` of the rows. Raises UserError if they are on another form."""
    if is_weight(table.base):
        raise UserError(
            f"{TABLE} is a {type(table).__name__} on a {type(table.base).__name__}: PEFT has one form per layer"
        )
    return tensors.on_host(table.rows), tensors.on_host(table.ids).astype(int).tolist()


def adapter_content(
    params: PyTree, base: Base, trained: Iterable[str], method: Mapping[str, Any], original: PyTree | None
) -> Content:
    """The JSON and the tensors of the token rows in `params`. Raises UserError for other trained leaves."""
    del method, original
    forms = [name for name, w in tree.named_leaves(params, is_weight) if is_weight(w)]
    rest = {*trained, *getattr(base, "new", ()), *forms} - {TABLE, f"{TABLE}/rows", f"{TABLE}/ids"}
    if rest:
        raise UserError(f"a PEFT adapter of type {TYPE} cannot hold {min(rest)}")
    module, (rows, ids) = _path(base), _on_host(params["embed"]["embedding"])
    arrays = {f"{tensors.PREFIX}{name}{SUFFIX}": rows for name in (module, *([HEAD] if _shared(base) else []))}
    summary = {
        **configs.common_keys(TYPE, base),
        "init_weights": True,
        "target_modules": module,
        "token_indices": ids,
    }
    return summary, arrays


def _path(base: Base) -> str:
    """The path of the embedding's module."""
    return next(path for path, m in base_modules(base).items() if m.weight and m.weight.leaf == TABLE)


def _shared(base: Base) -> bool:
    return getattr(base.config, "tied", False) and not base.config.num_labels
