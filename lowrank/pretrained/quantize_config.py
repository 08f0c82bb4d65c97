"""The `model.quantize` group of a config: which kernels become codes as a checkpoint is read, and by which scheme."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank.core import config_schema, tree
from lowrank.core.errors import UserError, unknown
from lowrank.core.typing import PyTree
from lowrank.pretrained import quantized_checkpoint
from lowrank.pretrained.mixed_bits import MixedBits
from lowrank.pretrained.quantize_on_load import TARGET, Quantization, Reader, StoredAs
from lowrank.pretrained.tensor_reader import Stored
from lowrank.weights.quantized import ggml
from lowrank.weights.quantized.base import Quantized
from lowrank.weights.quantized.schemes import SCHEMES, group_of, jit_quantizer

OWN = "gguf"  # in place of a scheme: the blocks that the file has


class OwnBlocks(Quantization):
    """The blocks of a GGUF file, as they are. All layers of a leaf must have the same."""

    def shape(self, name: str, leaf: Any, parts: Sequence[Stored]) -> Quantized:
        """As for all; raises UserError for a leaf that the file does not keep in blocks of one known format."""
        formats = sorted({part.dtype for part in parts})
        if not parts or not all(part.blocks for part in parts) or not set(formats) <= ggml.FORMATS.keys():
            found = f"in {' and '.join(formats)}" if parts else "in no GGUF file"
            known = ", ".join(ggml.FORMATS)
            raise UserError(f"{name} is {found}, and model.quantize=gguf keeps {known}: leave it out of the target")
        if len(formats) > 1:
            raise UserError(f"{name} has layers in {' and '.join(formats)}: leave it out of model.quantize.target")
        f = ggml.FORMATS[formats[0]]
        size = (*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-2] // f.block * f.bytes)
        raw = jax.ShapeDtypeStruct(size, "uint8")
        return jax.eval_shape(lambda b: ggml.from_bytes(b, formats[0], leaf.dtype.name), raw)

    def layer(self, name: str, part: Stored, read: Callable[[], np.ndarray], like: Quantized) -> Quantized:
        """The blocks of one tensor, whose rows are the kernel's outputs. Raises UserError if they are not finite."""
        del read
        form = _from_bytes(part.blocks(0, like.shape[-1]), like.format, like.dtype_name)
        for field in (form.scale, form.low):
            if field is not None and not np.isfinite(np.asarray(field)).all():
                raise UserError(f"tensor {name!r} holds NaN or infinite values")
        return form


_from_bytes = jax.jit(ggml.from_bytes, static_argnums=(1, 2))


def shapes(codes: Quantization, params: PyTree, new: Callable[[str], bool], stored: StoredAs, read: Reader) -> PyTree:
    """Shapes of parameters, with forms where kernels are quantised; `new` leaves are in no checkpoint and stay.

    `stored` gives what each leaf is read from, `read` its kernels. Raises UserError for a target that matches none.
    """
    hits = tree.matching(codes.target, tree.names(params), "model.quantize target")
    for name in hits:
        if not name.endswith("kernel"):
            raise UserError(f"{name} is no kernel: only kernels [..., in, out] are quantised")
    found = {name for name in hits if not new(name)}
    codes = codes.prepared({n: leaf for n, leaf in tree.named_leaves(params) if n in found}, read)
    form = lambda name, leaf: codes.shape(name, leaf, stored(name))  # noqa: E731
    return tree.map_named(lambda n, leaf: form(n, leaf) if n in found else leaf, params)


def build(given: Mapping[str, Any] | str | None) -> Quantization | None:
    """The `model.quantize` group `{"name": "nf4", "target": regex, ...}`; None without one. Raises UserError."""
    options = group_of(given)
    if not options:
        return None
    name, target = options.pop("name", None), options.pop("target", TARGET)
    if name == OWN and not options:
        return OwnBlocks(target, lambda kernel: kernel)
    if name in quantized_checkpoint.CALIBRATED:
        raise UserError(
            f"{name} needs data: write a base with python -m launch.quantize --scheme={name}, and name that"
        )
    if name not in SCHEMES:
        raise unknown("model.quantize.name", name, [*SCHEMES, OWN])
    make = config_schema.call(SCHEMES[name], options, "model.quantize")
    if name == "mixed":
        return MixedBits(target, make, make.keywords)
    return Quantization(target, jit_quantizer(make))


def refuse_quantised(where: str, hf_config: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint whose tensors another tool has quantised."""
    about = hf_config.get("quantization_config")
    if about and not (isinstance(about, Mapping) and about.get("quant_method") == "lowrank"):
        kind = about.get("quant_method", "an unnamed scheme") if isinstance(about, Mapping) else about
        raise UserError(f"{where} is quantised by {kind}: name the original checkpoint, and quantise it as it is read")
