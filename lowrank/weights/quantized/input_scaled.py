"""A kernel whose inputs are scaled before it is quantized, as by AWQ (Lin et al. 2023, arXiv:2306.00978)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lowrank.core.weight import Weight, at_least_float32, dot_to_float32, form, frozen
from lowrank.weights.gains import scale_rounded
from lowrank.weights.quantized.base import Quantized


@form
class InputScaled(Weight):
    """`W = diag(inputs) Q(diag(1 / inputs) W)`: `scaled` holds the codes, and `inputs` float32 `[..., in]` is 1 / s.

    s is AWQ's scale. The paper folds `inputs` into the preceding operation; here it is a leaf, so that it works in any
    model.
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
        """The dtype of the dequantized codes."""
        return self.scaled.dtype

    def with_dtype(self, dtype_name: str) -> Self:
        """The same codes, dequantized to the dtype `dtype_name`."""
        return dataclasses.replace(self, scaled=self.scaled.with_dtype(dtype_name))

    def materialize(self) -> jax.Array:
        """The dequantized kernel `[..., in, out]`, its inputs scaled back."""
        values = at_least_float32(self.scaled.materialize())
        spread = jnp.broadcast_to(self.inputs[..., None].astype(values.dtype), values.shape)
        return (values * spread).astype(self.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`(x * inputs) @ Q`; in half precision, `x * inputs` is rounded, as Q is."""
        return dot_to_float32(scale_rounded(x, self.inputs), self.scaled)


def scale_inputs(w: jax.Array, scale: jax.Array, quantize: Callable[[jax.Array], Quantized]) -> InputScaled:
    """The kernel `w` `[..., in, out]`, quantized after its inputs are multiplied by `scale` `[..., in]`."""
    kernel = w.astype(jnp.float32) * jnp.broadcast_to(scale[..., None], w.shape)
    return InputScaled(scaled=quantize(kernel).with_dtype(jnp.dtype(w.dtype).name), inputs=1 / scale)
