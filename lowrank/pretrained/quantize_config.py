"""The `model.quantize` group of a config: which kernels are quantized as a checkpoint is read, and by which scheme."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core import config_schema, tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.pretrained import fp8
from lowrank.pretrained.quantize_on_load import (
    DEFAULT_TARGET,
    GGUFBlocks,
    KernelSources,
    LoadQuantizer,
    MixedBits,
    StoredParts,
)
from lowrank.weights.quantized import input_scaled
from lowrank.weights.quantized.schemes import SCHEMES, Quantizer, integer, jit_quantizer, scheme_group

GGUF_BLOCKS = "gguf"  # the name that stands for the blocks of the file


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
    quantize = integer(bits, block, symmetric)
    return lambda w: input_scaled.scale_inputs(w, jnp.ones(w.shape[:-1]), quantize)


# The schemes that data calibrate, as plain rounding: it gives their codes' shapes, and the codes of a merged kernel.
CALIBRATED: dict[str, Callable[..., Quantizer]] = {"gptq": _gptq, "awq": _awq}
ALL_SCHEMES = {**SCHEMES, **CALIBRATED}


def calibration_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a calibrated scheme's group, with the defaults of those that it leaves out."""
    defaults = {k: p.default for k, p in inspect.signature(CALIBRATED[group["name"]]).parameters.items()}
    return {name: group.get(name, default) for name, default in defaults.items()}


def build_quantizer(given: Mapping[str, Any] | str | None) -> LoadQuantizer | None:
    """The quantizer of a `model.quantize` group `{"name": "nf4", "target": regex, ...}`; None without a group.

    Raises UserError for an unknown scheme or option, and for a scheme that needs calibration data.
    """
    group = scheme_group(given)
    if not group:
        return None
    name = group.get("name")
    if name == GGUF_BLOCKS:
        return _gguf_blocks(group)
    if name in CALIBRATED:
        command = f"python -m launch.quantize --scheme={name}"
        raise UserError(f"{name} needs data: write a base with {command}, and set model.name to its folder")
    if name not in SCHEMES:
        raise unknown("model.quantize.name", str(name), [*SCHEMES, GGUF_BLOCKS])
    return build_rounding(group, "model.quantize")


def _gguf_blocks(group: Mapping[str, Any]) -> GGUFBlocks:
    for key in group.keys() - {"name", "target"}:
        raise unknown("config key", f"model.quantize.{key}", ["model.quantize.name", "model.quantize.target"])
    return GGUFBlocks(group.get("target", DEFAULT_TARGET), lambda kernel: kernel)


def build_rounding(
    given: Mapping[str, Any] | str, where: str = "scheme", high: Mapping[str, int] | None = None
) -> LoadQuantizer:
    """The quantizer of any scheme's group; a calibrated scheme becomes plain rounding.

    `high` is the number of 4-bit groups of each leaf, for the scheme "mixed". Raises UserError naming `where`.
    """
    options = scheme_group(given)
    name, target = options.pop("name", None), options.pop("target", DEFAULT_TARGET)
    if name not in ALL_SCHEMES:
        raise unknown(f"quantization scheme in {where}", str(name), ALL_SCHEMES)
    quantize: Any = config_schema.call_with_group(ALL_SCHEMES[name], options, where)
    if name == "mixed":
        return MixedBits(target, quantize, quantize.keywords, high)
    return LoadQuantizer(target, jit_quantizer(quantize))


def quantized_shapes(
    quantizer: LoadQuantizer,
    params: PyTree,
    is_new: Callable[[str], bool],
    parts: StoredParts,
    sources: KernelSources,
) -> PyTree:
    """The shapes of parameters, with forms for the kernels that `quantizer` targets.

    Leaves that are new, in no checkpoint, stay plain. Raises UserError for a target that matches no kernel.
    """
    matches = tree.match_names(quantizer.target, tree.leaf_names(params), "model.quantize target")
    for name in matches:
        if not name.endswith("kernel"):
            raise UserError(f"{name} is not a kernel: only kernels [..., in, out] can be quantized, change the target")
    stored = {name for name in matches if not is_new(name)}
    quantizer = quantizer.prepare({n: leaf for n, leaf in tree.named_leaves(params) if n in stored}, sources)

    def shape(name: str, leaf: jax.ShapeDtypeStruct) -> Any:
        return quantizer.leaf_shape(name, leaf, parts) if name in stored else leaf

    return tree.map_named(shape, params)


def refuse_other_quantization(where: str, hf_config: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint whose tensors another tool has quantized, except to 8-bit floats."""
    config = hf_config.get("quantization_config")
    if (
        config
        and not fp8.is_fp8(config)
        and not (isinstance(config, Mapping) and config.get("quant_method") == "lowrank")
    ):
        tool = config.get("quant_method", "an unnamed scheme") if isinstance(config, Mapping) else config
        raise UserError(f"{where} is quantized by {tool}: name the original checkpoint, and set model.quantize")
