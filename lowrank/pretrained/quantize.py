"""The `model.quantize` group of a config: which kernels become codes as a checkpoint is read, and by which scheme."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowrank import settings, tree
from lowrank.errors import UserError, unknown
from lowrank.weights.quantized import Quantized
from lowrank.weights.schemes import SCHEMES

PyTree = Any
TARGET = r"(layers|top)/(attn|mlp)/(q|k|v|qkv|o|gate|up|down)/kernel"  # not heads, embeddings, routers, experts


@dataclasses.dataclass(frozen=True)
class Quantization:
    """`make` turns each kernel `[in, out]` whose leaf `target` matches into codes."""

    target: str
    make: Callable[[jax.Array], Quantized]

    def form(self, kernel: Any, kind: str) -> Quantized:
        """The codes of one kernel, or of a stack, that decode to the dtype `kind`."""
        return dataclasses.replace(self.make(kernel), kind=kind)

    def shapes(self, params: PyTree, new: Callable[[str], bool]) -> PyTree:
        """Shapes of parameters, with forms where kernels are quantised; `new` leaves are in no checkpoint and stay."""
        hits = tree.matching(self.target, tree.names(params), "model.quantize target")
        for name in hits:
            if not name.endswith("kernel"):
                raise UserError(f"{name} is no kernel: only kernels [..., in, out] are quantised")

        def shape(name: str, leaf: Any) -> Any:
            if name not in hits or new(name):
                return leaf
            return jax.eval_shape(lambda x: self.form(x, leaf.dtype.name), leaf)

        return tree.map_named(shape, params)


def group_of(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The `model.quantize` group, which a name alone may stand for; empty if there is none."""
    return {"name": given} if isinstance(given, str) else dict(given or {})


def build(given: Mapping[str, Any] | str | None) -> Quantization | None:
    """The `model.quantize` group `{"name": "nf4", "target": regex, ...}`; None without one. Raises UserError."""
    options = group_of(given)
    if not options:
        return None
    name, target = options.pop("name", None), options.pop("target", TARGET)
    if name not in SCHEMES:
        raise unknown("model.quantize.name", name, SCHEMES)
    return Quantization(target, jax.jit(settings.call(SCHEMES[name], options, "model.quantize")))


def refuse_quantised(where: str, hf_config: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint whose tensors another tool has quantised."""
    about = hf_config.get("quantization_config")
    if about:
        kind = about.get("quant_method", "an unnamed scheme") if isinstance(about, Mapping) else about
        raise UserError(f"{where} is quantised by {kind}: name the original checkpoint, and quantise it as it is read")
