"""What turns the kernels of a checkpoint into codes as it is read."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from lowrank.pretrained.tensor_reader import Stored
from lowrank.weights.quantized.base import Quantized

StoredAs = Callable[[str], Sequence[Stored]]
# Of a leaf, each tensor: (what it is known by while its file is not changed, its name, how to read its kernel).
Reader = Callable[[str], Iterator[tuple[tuple[Any, ...], str, Callable[[], np.ndarray]]]]

TARGET = r"(layers|top)/(attn|mlp)/(q|k|v|qkv|o|gate|up|down)/kernel"  # not heads, embeddings, routers, experts


@dataclasses.dataclass(frozen=True)
class Quantization:
    """`make` turns each kernel `[in, out]` whose leaf `target` matches into codes."""

    target: str
    make: Callable[[jax.Array], Quantized]

    def form(self, kernel: Any, dtype_name: str) -> Quantized:
        """The codes of one kernel, or of a stack, that decode to the dtype `dtype_name`."""
        return self.make(kernel).with_dtype(dtype_name)

    def prepared(self, leaves: Mapping[str, Any], read: Reader) -> Self:
        """The same, knowing all kernels that it is for: `{leaf name: shape and dtype}`, and how to read them."""
        del leaves, read
        return self

    def shape(self, name: str, leaf: Any, parts: Sequence[Stored]) -> Quantized:
        """The form of a leaf `[..., in, out]`, which is stored as `parts`, in shapes."""
        del name, parts
        return jax.eval_shape(lambda x: self.form(x, leaf.dtype.name), leaf)

    def layer(self, name: str, part: Stored, read: Callable[[], np.ndarray], like: Quantized) -> Quantized:
        """The form of one tensor `name`, whose kernel `read` returns."""
        return self.form(jax.device_put(read()), like.dtype.name)
