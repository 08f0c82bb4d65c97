"""Checkpoints that hold our codes: a Hugging Face directory whose config.json has a `quantization_config` of ours.

`{"quant_method": "lowrank", "scheme": {"name": ..., "target": ..., options}, "high": {leaf: groups}}`, the last for a
scheme that divides bits. In place of `model.layers.0.mlp.up_proj.weight` there is a tensor for each array of the
kernel's form, `model.layers.0.mlp.up_proj.codes`, `....scale.second`, laid out as in memory: `[in, out]`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import config_schema, tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.weight import is_weight
from lowrank.pretrained.hf_files import CODES
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.mixed_bits import MixedBits
from lowrank.pretrained.quantize_on_load import TARGET, Quantization
from lowrank.weights.quantized import input_scaled
from lowrank.weights.quantized.schemes import SCHEMES, Quantizer, group_of, integer, jit_quantizer

METHOD = "lowrank"
_STORED = {jnp.dtype(kind): name for name, kind in CODES.items()}


def _gptq(
    bits: int = 4, block: int = 64, symmetric: bool = True, act_order: bool = False, damping: float = 0.01
) -> Quantizer:
    if damping <= 0:
        raise UserError(f"quantize.damping must be above 0, not {damping}")
    del act_order
    return integer(bits, block, symmetric)


def _awq(bits: int = 4, block: int = 64, symmetric: bool = False, grid: int = 20) -> Quantizer:
    if grid < 1:
        raise UserError(f"quantize.grid must be at least 1, not {grid}")
    make = integer(bits, block, symmetric)
    return lambda w: input_scaled.scale_inputs(w, jnp.ones(w.shape[:-1]), make)


# What is calibrated by data, as rounding alone: the shapes of its codes, and what a merged kernel becomes in them.
CALIBRATED: dict[str, Callable[..., Quantizer]] = {"gptq": _gptq, "awq": _awq}
KNOWN = {**SCHEMES, **CALIBRATED}


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a calibrated scheme's group, the defaults among them."""
    defaults = {k: p.default for k, p in inspect.signature(CALIBRATED[group["name"]]).parameters.items()}
    return {name: group.get(name, default) for name, default in defaults.items()}


def rounding(group: Mapping[str, Any] | str, where: str = "scheme", high: Mapping[str, int] | None = None) -> Any:
    """The `Quantization` of a scheme's group `{"name": ..., "target": ..., options}`. Raises UserError."""
    given = group_of(group)
    name, target = given.pop("name", None), given.pop("target", TARGET)
    if name not in KNOWN:
        raise unknown(f"{where}: quantisation scheme", name, KNOWN)
    make = config_schema.call(KNOWN[name], given, where)
    return (
        MixedBits(target, make, make.keywords, high) if name == "mixed" else Quantization(target, jit_quantizer(make))
    )


def scheme(where: str, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheme's group of a checkpoint in our codes; empty for any other."""
    about = hf_config.get("quantization_config")
    if not isinstance(about, Mapping) or about.get("quant_method") != METHOD:
        return {}
    if not isinstance(about.get("scheme"), Mapping):
        raise UserError(f"{where}: its quantization_config has no scheme")
    return dict(about["scheme"])


def coding(where: str, hf_config: Mapping[str, Any]) -> Quantization | None:
    """What the codes of a checkpoint are; None for a checkpoint without. Raises UserError for an unknown scheme."""
    group = scheme(where, hf_config)
    high = hf_config["quantization_config"].get("high") if group else None
    if high is not None and not (isinstance(high, Mapping) and all(type(k) is int and k >= 0 for k in high.values())):
        raise UserError(f"{where}: its quantization_config has no usable 'high'")
    if group.get("name") == "mixed" and high is None:
        raise UserError(f"{where}: its quantization_config has no 'high', which kernels have in 4 bits")
    return rounding(group, where, high) if group else None


def about(group: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of `{leaf name: array or form}` in the codes of a scheme's group."""
    mixed = {n: w for n, w in weights.items() if hasattr(w, "high")}
    high = {"high": {n: 0 if w.high is None else w.high.rows // w.block for n, w in mixed.items()}} if mixed else {}
    return {"quant_method": METHOD, "scheme": dict(group), **high}


def expanded(tensors: Sequence[Tensor], leaves: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and leaves with a form's arrays in its place, `{leaf}/{field}`."""
    fields = {n: {f"/{field}": x for field, x in tree.named_leaves(w)} for n, w in leaves.items() if is_weight(w)}
    whole = {n: {"": leaf} for n, leaf in leaves.items() if n not in fields}
    arrays = {f"{n}{field}": x for n, parts in (fields | whole).items() for field, x in parts.items()}
    parts = [[_part(t, *part) for part in fields[t.leaf].items()] if t.leaf in fields else [t] for t in tensors]
    return [part for of_tensor in parts for part in of_tensor], arrays


def _part(tensor: Tensor, field: str, array: Any) -> Tensor:
    name = tensor.hf.removesuffix(".weight") + field.replace("/", ".")
    stack = {"first": tensor.first, "count": tensor.count, "experts": tensor.experts}
    return Tensor(tensor.leaf + field, name, dtype=_STORED[jnp.dtype(array.dtype)], **stack)


def collected(leaves: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `expanded`: leaves, forms among them, of arrays by name."""

    def one(name: str, leaf: Any) -> Any:
        if not is_weight(leaf):
            return arrays[name]
        return jax.tree.unflatten(jax.tree.structure(leaf), [arrays[f"{name}/{f}"] for f in tree.names(leaf)])

    return {name: one(name, leaf) for name, leaf in leaves.items()}
