"""Checkpoints in codes: a Hugging Face directory whose config.json has a `quantization_config` of this package.

It is `{"quant_method": "lowrank", "scheme": {"name": ..., "target": ..., options}, "high": {leaf: groups}}`, `high` for
a scheme that mixes bits. In place of `model.layers.0.mlp.up_proj.weight` the checkpoint has a tensor per array of the
kernel's form, `model.layers.0.mlp.up_proj.codes`, `....scale.second`, in the layout of memory: `[in, out]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import schema, tree
from lowrank.core.errors import UserError
from lowrank.core.json_types import StoredCodes
from lowrank.core.weight import is_weight
from lowrank.pretrained.hf_files import CODES
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.quantize_config import build_rounding
from lowrank.pretrained.quantize_on_load import LoadQuantizer

METHOD = "lowrank"
_DTYPE_NAMES = {jnp.dtype(dtype): name for name, dtype in CODES.items()}


def stored_scheme(where: str, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheme's group of a checkpoint in codes; empty for any other checkpoint."""
    config = hf_config.get("quantization_config")
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
        return {}
    schema.check(f"{where}: its quantization_config", config, StoredCodes)
    return dict(config["scheme"])


def stored_quantizer(where: str, hf_config: Mapping[str, Any]) -> LoadQuantizer | None:
    """The quantizer that gives the forms of a checkpoint in codes; None for any other checkpoint.

    Raises UserError for a `quantization_config` that is not complete, and for an unknown scheme.
    """
    group = stored_scheme(where, hf_config)
    high = hf_config["quantization_config"].get("high") if group else None
    if group.get("name") == "mixed" and high is None:
        raise UserError(f"{where}: its quantization_config has no 'high', the number of 4-bit groups per kernel")
    return build_rounding(group, where, high) if group else None


def quantization_config(group: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of `{leaf name: array or form}` in the codes of a scheme's group."""
    mixed = {n: w for n, w in leaves.items() if hasattr(w, "high")}
    high = {"high": {n: 0 if w.high is None else w.high.rows // w.block for n, w in mixed.items()}} if mixed else {}
    return {"quant_method": METHOD, "scheme": dict(group), **high}


def expand_forms(tensors: Sequence[Tensor], leaves: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and leaves in which each form is replaced by its arrays, named `{leaf}/{field}`."""
    fields = {n: {f"/{field}": x for field, x in tree.named_leaves(w)} for n, w in leaves.items() if is_weight(w)}
    plain = {n: {"": leaf} for n, leaf in leaves.items() if n not in fields}
    arrays = {f"{n}{field}": x for n, parts in (fields | plain).items() for field, x in parts.items()}
    parts = [[_part(t, *part) for part in fields[t.leaf].items()] if t.leaf in fields else [t] for t in tensors]
    return [part for parts_of_tensor in parts for part in parts_of_tensor], arrays


def _part(tensor: Tensor, field: str, array: Any) -> Tensor:
    name = tensor.hf.removesuffix(".weight") + field.replace("/", ".")
    dtype = _DTYPE_NAMES[jnp.dtype(array.dtype)]
    return Tensor(
        tensor.leaf + field, name, first=tensor.first, count=tensor.count, experts=tensor.experts, dtype=dtype
    )


def collect_forms(leaves: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `expand_forms`: `{leaf name: array or form}` of arrays by name; `leaves` gives the forms."""

    def collect(name: str, leaf: Any) -> Any:
        if not is_weight(leaf):
            return arrays[name]
        return jax.tree.unflatten(jax.tree.structure(leaf), [arrays[f"{name}/{f}"] for f in tree.leaf_names(leaf)])

    return {name: collect(name, leaf) for name, leaf in leaves.items()}
