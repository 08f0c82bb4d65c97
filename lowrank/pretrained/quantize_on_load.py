"""Quantization while loading: each kernel of a checkpoint becomes codes as soon as it is read.

`LoadQuantizer` applies one scheme to each kernel alone. `MixedBits` divides one budget of bits among all kernels by
their gains. `GGUFBlocks` keeps the blocks of a GGUF file.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from lowrank.core.errors import UserError
from lowrank.pretrained.tensor_reader import StoredTensor, check_finite
from lowrank.weights.quantized import ggml, mixed
from lowrank.weights.quantized.ggml import GGML
from lowrank.weights.quantized.mixed import Mixed

DEFAULT_TARGET = (
    r"(layers|top)/(attn|mlp)/(q|k|v|qkv|o|gate|up|gate_up|down)/kernel"  # no heads, embeddings, routers, experts
)
ReadKernel = Callable[[], np.ndarray]  # -> a kernel [in, out], float32


class KernelSource(NamedTuple):
    """One tensor of a leaf. `key` identifies its content: it stays the same as long as its file does not change."""

    key: tuple[Any, ...]
    name: str
    read: ReadKernel


StoredParts = Callable[[str], Sequence[StoredTensor]]  # leaf name -> the tensors that the leaf is read from
KernelSources = Callable[[str], Iterator[KernelSource]]  # leaf name -> how to read each of its kernels


@dataclasses.dataclass(frozen=True)
class LoadQuantizer:
    """`quantize` turns each kernel `[in, out]` whose leaf name `target` matches into codes."""

    target: str
    quantize: Callable[[Any], Any]

    def form(self, kernel: Any, dtype_name: str) -> Any:
        """The codes of one kernel, or of a stack, that decode to the dtype `dtype_name`."""
        return self.quantize(kernel).with_dtype(dtype_name)

    def prepare(self, leaves: Mapping[str, Any], sources: KernelSources) -> Self:
        """A quantizer adapted to all its kernels: `{leaf name: shape and dtype}`, and how to read them."""
        del leaves, sources
        return self

    def leaf_shape(self, name: str, leaf: Any, parts: StoredParts) -> Any:
        """The form, in shapes, of a leaf `[..., in, out]` that is stored as `parts(name)`."""
        del name, parts
        return jax.eval_shape(lambda x: self.form(x, leaf.dtype.name), leaf)

    def quantize_layer(self, name: str, part: StoredTensor, read: ReadKernel, like: Any) -> Any:
        """The form of one tensor `name`, whose kernel `read` returns; `like` is the form of its leaf in shapes."""
        del name, part
        return self.form(jax.device_put(read()), like.dtype.name)


class GGUFBlocks(LoadQuantizer):
    """The blocks of a GGUF file, unchanged. All layers of a leaf must have the same block format."""

    def leaf_shape(self, name: str, leaf: Any, parts: StoredParts) -> GGML:
        """The form, in shapes, of a leaf. Raises UserError unless the file stores it in blocks of one known format."""
        found = parts(name)
        formats = sorted({part.dtype for part in found})
        if not found or not all(part.blocks for part in found) or not set(formats) <= ggml.FORMATS.keys():
            stored = f"stored in {' and '.join(formats)}" if found else "not stored in a GGUF file"
            known = ", ".join(ggml.FORMATS)
            raise UserError(f"{name} is {stored}, and model.quantize=gguf keeps {known}: leave it out of the target")
        if len(formats) > 1:
            raise UserError(f"{name} has layers in {' and '.join(formats)}: leave it out of model.quantize.target")
        f = ggml.FORMATS[formats[0]]
        size = (*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-2] // f.block * f.block_bytes)
        raw = jax.ShapeDtypeStruct(size, "uint8")
        return jax.eval_shape(lambda b: ggml.from_file_blocks(b, formats[0], leaf.dtype.name), raw)

    def quantize_layer(self, name: str, part: StoredTensor, read: ReadKernel, like: GGML) -> GGML:
        """The blocks of one tensor, whose rows are the kernel's outputs. Raises UserError if a scale is not finite."""
        del read
        assert part.blocks is not None
        form = _from_bytes(part.blocks(0, like.shape[-1]), like.format, like.dtype_name)
        for scale in (form.scale, form.low):
            if scale is not None:
                check_finite(name, np.asarray(scale, np.float32))
        return form


_from_bytes = jax.jit(ggml.from_file_blocks, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class MixedBits(LoadQuantizer):
    """`high` is the number of 4-bit groups of each leaf; None until `prepare` has divided the budget of bits.

    The shapes of the codes depend on the weights: a description of the model reads every kernel once and quantizes it
    to 2 and to 4 bits, which takes as long as loading it. The gains, a number per group of inputs, are cached.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    high: Mapping[str, int] | None = None

    def prepare(self, leaves: Mapping[str, Any], sources: KernelSources) -> Self:
        """The quantizer with `high` set over all leaves. Raises UserError for a kernel that is not finite."""
        if self.high is not None:
            return self
        block = self.options["block"]
        gain = {name: np.stack([_cached_gains(source, block) for source in sources(name)]) for name in leaves}
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        return dataclasses.replace(self, high=mixed.allocate_groups(gain, shapes, **self.options))

    def leaf_shape(self, name: str, leaf: Any, parts: StoredParts) -> Mixed:
        """The form, in shapes, of a leaf. Raises UserError if `high` does not have it."""
        del parts
        high = self.high or {}
        counts = [high[n] for n in (name, re.sub("^top/", "layers/", name)) if n in high]
        if not counts:
            raise UserError(f"the number of 4-bit groups of {name} is missing: quantize the original checkpoint again")
        quantized = functools.partial(self._quantized, high=counts[0], dtype_name=leaf.dtype.name)
        return jax.eval_shape(quantized, leaf)

    def quantize_layer(self, name: str, part: StoredTensor, read: ReadKernel, like: Mixed) -> Mixed:
        """The form of one tensor `name`, with as many 4-bit groups as `like` has."""
        del name, part
        high = 0 if like.high is None else like.high.rows // like.block
        return self._quantized(read(), high=high, dtype_name=like.dtype.name)

    def _quantized(self, kernel: Any, high: int, dtype_name: str) -> Mixed:
        options = {k: v for k, v in self.options.items() if k != "budget"}
        return _quantize_mixed(kernel, high=high, **options).with_dtype(dtype_name)


_quantize_mixed = jax.jit(mixed.quantize, static_argnames=("high", "block", "double"))
_gains = jax.jit(mixed.error_reductions, static_argnums=1)
_CACHE: dict[tuple[Any, ...], np.ndarray] = {}  # (key of a kernel, block) -> its gains
_CACHE_SIZE = 100_000


def _cached_gains(source: KernelSource, block: int) -> np.ndarray:
    key = (*source.key, block)
    if key not in _CACHE:
        if len(_CACHE) > _CACHE_SIZE:
            _CACHE.clear()
        _CACHE[key] = np.asarray(_gains(source.read(), block))
    return _CACHE[key]
