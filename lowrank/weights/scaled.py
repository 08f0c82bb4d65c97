"""(IA)^3: a learned vector that rescales a kernel's outputs or inputs (Liu et al. 2022, arXiv:2205.05638)."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import KERNEL, Weight, at_least_float32, dot, form, frozen, materialize, static, trainable


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

    def dot(self, x: jax.Array) -> jax.Array:
        """`(x @ W) * s` or `(x * s) @ W`."""
        return _times(dot(x, self.base), self.s) if self.side == "out" else dot(_times(x, self.s), self.base)

    def affine(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`dot(x) + merged_bias(bias)`, since an output scale acts on the layer's whole output, its bias included."""
        return self.dot(x) + jnp.broadcast_to(self.merged_bias(bias).astype(x.dtype), (*x.shape[:-1], bias.shape[-1]))

    def merged_bias(self, bias: jax.Array) -> jax.Array:
        """The rescaled layer's bias: `bias * s` for a scale of the outputs, in the bias's dtype."""
        return (bias * self.s).astype(bias.dtype) if self.side == "out" else bias


def attach(w: Any, side: str) -> Scaled:
    """A Scaled on `w` `[..., in, out]` that starts as the identity."""
    width = w.shape[-1] if side == "out" else w.shape[-2]
    return Scaled(base=w, s=jnp.ones((*w.shape[:-2], width), jnp.float32), side=side)


def _times(x: jax.Array, s: jax.Array) -> jax.Array:
    return x * jnp.broadcast_to(s.astype(x.dtype), x.shape)
