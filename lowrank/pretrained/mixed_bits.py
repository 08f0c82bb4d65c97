"""`model.quantize={"name": "mixed", "budget": 3.5}`: one budget of bits, divided among the kernels by what it gains.

The shapes of codes depend on the weights, so a description of the model reads every kernel once, and quantises it to 2
and to 4 bits: as long as loading it. What is found is kept for the process, a number for each group of inputs.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank.core.errors import UserError
from lowrank.pretrained.quantize_on_load import Quantization, Reader
from lowrank.pretrained.tensor_reader import Stored
from lowrank.weights.quantized import mixed
from lowrank.weights.quantized.base import Quantized

_GAINS: dict[tuple[Any, ...], np.ndarray] = {}  # by checkpoint, tensor and block
_MOST = 100_000


@dataclasses.dataclass(frozen=True)
class MixedBits(Quantization):
    """`high` are the groups of each leaf in 4 bits; without it, they are chosen once the kernels can be read."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    high: Mapping[str, int] | None = None

    def prepared(self, leaves: Mapping[str, Any], read: Reader) -> "MixedBits":
        """With `high` by `mixed.divided` over all leaves. Raises UserError for what cannot be read or is not finite."""
        if self.high is not None:
            return self
        block = self.options["block"]
        gain = {name: np.stack([_gains(*one, block) for one in read(name)]) for name in leaves}
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        return dataclasses.replace(self, high=mixed.divided(gain, shapes, **self.options))

    def shape(self, name: str, leaf: Any, parts: Any) -> Any:
        """As for all."""
        del parts
        found = [self.high[n] for n in (name, re.sub("^top/", "layers/", name)) if n in self.high]
        if not found:
            raise UserError(f"it is not known how many groups of {name} are in 4 bits")
        made = functools.partial(self._made, high=found[0], dtype_name=leaf.dtype.name)
        return jax.eval_shape(made, leaf)

    def layer(self, name: str, part: Stored, read: Callable[[], np.ndarray], like: Any) -> Any:
        """As for all; `like` says how many groups are in 4 bits."""
        del part
        high = 0 if like.high is None else like.high.rows // like.block
        return self._made(read(), high=high, dtype_name=like.dtype.name)

    def _made(self, kernel: Any, high: int, dtype_name: str) -> Quantized:
        options = {k: v for k, v in self.options.items() if k != "budget"}
        return _quantize(kernel, high=high, **options).with_dtype(dtype_name)


_quantize = jax.jit(mixed.quantize, static_argnames=("high", "block", "double"))
_found = jax.jit(mixed.gains, static_argnums=1)


def _gains(key: tuple[Any, ...], name: str, read: Callable[[], np.ndarray], block: int) -> np.ndarray:
    key = (*key, block)
    if key not in _GAINS:
        if len(_GAINS) > _MOST:
            _GAINS.clear()
        _GAINS[key] = np.asarray(_found(read(), block))
    return _GAINS[key]
