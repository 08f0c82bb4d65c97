"""Quantisation-aware training: a float kernel that multiplies as its codes would (Jacob et al. 2018, arXiv:1712.05877).

Forward the values of the codes, backward as if nothing had been rounded (straight through: Bengio et al. 2013,
arXiv:1308.3432). The codes of what was learned are what is kept in the end.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import KERNEL, Weight, at_least_float32, form, static, trainable
from lowrank.kernels.half_precision_matmul import matmul
from lowrank.weights.quantized.base import Quantized
from lowrank.weights.quantized.schemes import SCHEMES


@form
class FakeQuantized(Weight):
    """`latent` `[..., in, out]`, what is learned; `scheme` and `options` say which codes it stands for.

    With `activations` bits the inputs are rounded too, by each token's largest magnitude.
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
        """That of the kernel it was made from; what is learned is float32."""
        return jnp.dtype("float64" if self.latent.dtype == jnp.float64 else self.dtype_name)

    def codes(self) -> Quantized:
        """The codes of what was learned."""
        return SCHEMES[self.scheme](**dict(self.options))(self.latent.astype(jnp.float32))

    def materialize(self) -> jax.Array:
        """The values of the codes; the gradient goes to `latent` as it is."""
        values = self.codes().materialize().astype(self.latent.dtype)
        return (self.latent + jax.lax.stop_gradient(values - self.latent)).astype(self.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ W`, with `x` rounded to `activations` bits if there are any."""
        x = round_activations(x, self.activations) if self.activations else x
        return matmul(x, self.materialize())


def round_activations(x: jax.Array, bits: int) -> jax.Array:
    """`x` `[..., in]` on an even grid about 0 to each row's largest magnitude, with the gradient of `x` itself."""
    top, values = 2 ** (bits - 1) - 1, at_least_float32(x)
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    step = jnp.broadcast_to(jnp.where(largest > 0, largest / top, 1), values.shape)
    return x + jax.lax.stop_gradient((jnp.round(values / step) * step).astype(x.dtype) - x)


def attach(w: jax.Array, *, scheme: str, options: tuple[tuple[str, Any], ...], activations: int) -> FakeQuantized:
    """A kernel that is learned under quantisation, from `w` on."""
    return FakeQuantized(
        latent=w.astype(jnp.float32), scheme=scheme, options=options, dtype_name=w.dtype.name, activations=activations
    )
