"""(IA)^3: a learned vector that rescales a kernel's outputs or inputs (Liu et al. 2022, arXiv:2205.05638)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot_to_float32,
    form,
    frozen,
    grouped_to_float32,
    materialize,
    static,
    trainable,
)
from lowrank.kernels import half_precision_matmul
from lowrank.weights.gains import group_of_rows, scale, scale_product


@form
class Scaled(Weight):
    """`W * s` by columns (`side='out'`, `s` `[..., out]`) or by rows (`side='in'`, `s` `[..., in]`)."""

    base: Any = frozen(axes=KERNEL)
    s: jax.Array = trainable(decay=False)
    side: str = static(default="out")

    def materialize(self) -> jax.Array:
        """The rescaled kernel, in the base's dtype."""
        base = materialize(self.base)
        s = self.s[..., None, :] if self.side == "out" else self.s[..., :, None]
        return (at_least_float32(base) * s).astype(base.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`(x @ W) * s` or `(x * s) @ W`.

        For half-precision `x`, `x * s` is the sum of two arrays in the dtype of `x`. Both are multiplied by W in the
        forward pass, since one of them would round the gains away, and the larger one in the backward pass.
        """
        return self._scaled(x, dot_to_float32)

    def grouped_to_float32(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`(x[i] @ W_g) * s_g` or `(x[i] * s_g) @ W_g` for rows sorted by group."""
        multiply = lambda x, w: grouped_to_float32(x, w, sizes)  # noqa: E731
        return self._scaled(x, multiply, group_of_rows(sizes, len(x)))

    def _scaled(
        self, x: jax.Array, multiply: Callable[[jax.Array, Any], jax.Array], groups: jax.Array | None = None
    ) -> jax.Array:
        if self.side == "out":
            return scale_product(multiply(x, self.base), self.s, x.dtype, groups)
        wide = scale(at_least_float32(x), self.s, x, groups)
        if wide.dtype == x.dtype:
            return multiply(wide, self.base)
        rest = half_precision_matmul.split(jax.lax.stop_gradient(wide), x.dtype, 2)[1]
        return multiply(wide.astype(x.dtype), self.base) + multiply(rest, jax.lax.stop_gradient(self.base))

    def affine_to_float32(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`dot(x) + merged_bias(bias)`, since an output scale acts on the layer's whole output, its bias included."""
        y = self.dot_to_float32(x)
        return y + jnp.broadcast_to(self.merged_bias(bias.astype(y.dtype)), y.shape)

    def merged_bias(self, bias: jax.Array) -> jax.Array:
        """The rescaled layer's bias: `bias * s` for a scale of the outputs, in the bias's dtype."""
        return (bias * self.s).astype(bias.dtype) if self.side == "out" else bias


def attach(w: Any, side: str) -> Scaled:
    """A Scaled on `w` `[..., in, out]` that starts as the identity."""
    width = w.shape[-1] if side == "out" else w.shape[-2]
    return Scaled(base=w, s=jnp.ones((*w.shape[:-2], width), jnp.float32), side=side)
