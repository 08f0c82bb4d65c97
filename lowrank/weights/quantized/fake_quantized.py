"""Quantization-aware training: a float kernel that multiplies as its codes would (Jacob et al. 2018, arXiv:1712.05877).

The forward pass uses the dequantized values, and the backward pass ignores the rounding (the straight-through estimator
of Bengio et al. 2013, arXiv:1308.3432). After training, the codes of the learned kernel are saved.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import KERNEL, Weight, at_least_float32, form, static, trainable
from lowrank.kernels.half_precision_matmul import matmul_to_float32
from lowrank.weights.quantized.base import Quantized
from lowrank.weights.quantized.schemes import SCHEMES


@form
class FakeQuantized(Weight):
    """The learned kernel `latent` `[..., in, out]`, which is quantized by `scheme` with `options`.

    If `activations` is not 0, the inputs are rounded to this many bits, scaled by each token's largest magnitude.
    """

    latent: jax.Array = trainable(axes=KERNEL)
    scheme: str = static()
    options: tuple[tuple[str, Any], ...] = static(default=())
    dtype_name: str = static(default="float32")
    activations: int = static(default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        return self.latent.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the original kernel; the latent kernel is float32."""
        return jnp.dtype("float64" if self.latent.dtype == jnp.float64 else self.dtype_name)

    def codes(self) -> Quantized:
        """The codes of the latent kernel."""
        return SCHEMES[self.scheme](**dict(self.options))(self.latent.astype(jnp.float32))

    def materialize(self) -> jax.Array:
        """The dequantized values; their gradient is that of `latent`, unchanged."""
        values = self.codes().materialize().astype(self.latent.dtype)
        return (self.latent + jax.lax.stop_gradient(values - self.latent)).astype(self.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W`, with `x` rounded to `activations` bits unless they are 0."""
        x = round_activations(x, self.activations) if self.activations else x
        return matmul_to_float32(x, self.materialize())


def round_activations(x: jax.Array, bits: int) -> jax.Array:
    """`x` `[..., in]` rounded to a grid of `2^bits - 1` values up to each row's largest magnitude.

    The gradient is that of `x` itself.
    """
    largest_code, values = 2 ** (bits - 1) - 1, at_least_float32(x)
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    step = jnp.broadcast_to(jnp.where(largest > 0, largest / largest_code, 1), values.shape)
    return x + jax.lax.stop_gradient((jnp.round(values / step) * step).astype(x.dtype) - x)


def attach(w: jax.Array, *, scheme: str, options: tuple[tuple[str, Any], ...], activations: int) -> FakeQuantized:
    """A FakeQuantized whose latent kernel starts as `w` `[..., in, out]`."""
    return FakeQuantized(
        latent=w.astype(jnp.float32), scheme=scheme, options=options, dtype_name=w.dtype.name, activations=activations
    )
