"""Evenly spaced codes of a kernel whose inputs were scaled first: AWQ (Lin et al. 2023, arXiv:2306.00978)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lowrank.core.weight import Weight, at_least_float32, dot, form, frozen
from lowrank.weights.quantized.base import Quantized


@form
class InputScaled(Weight):
    """`W = diag(inputs) Q(diag(1 / inputs) W)`: `scaled` are the codes, `inputs` float32 `[..., in]` one over AWQ's s.

    The paper folds `inputs` into the operation before; here it is a leaf, so that any model may have it.
    """

    scaled: Any = frozen()
    inputs: jax.Array = frozen()

    stored: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        return self.scaled.shape

    @property
    def dtype(self) -> Any:
        """That of the codes' values."""
        return self.scaled.dtype

    def with_dtype(self, dtype_name: str) -> Self:
        """The same codes, decoded to the dtype `dtype_name`."""
        return dataclasses.replace(self, scaled=self.scaled.with_dtype(dtype_name))

    def materialize(self) -> jax.Array:
        """The kernel that is multiplied by."""
        values = at_least_float32(self.scaled.materialize())
        spread = jnp.broadcast_to(self.inputs[..., None].astype(values.dtype), values.shape)
        return (values * spread).astype(self.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        """`(x * inputs) @ Q`."""
        return dot(x * jnp.broadcast_to(self.inputs.astype(x.dtype), x.shape), self.scaled)


def scale_inputs(w: jax.Array, scale: jax.Array, quantize: Callable[[jax.Array], Quantized]) -> InputScaled:
    """Codes by `quantize` of a kernel `[..., in, out]` whose inputs are multiplied by `scale` `[..., in]`."""
    kernel = w.astype(jnp.float32) * jnp.broadcast_to(scale[..., None], w.shape)
    return InputScaled(scaled=quantize(kernel).with_dtype(jnp.dtype(w.dtype).name), inputs=1 / scale)
