"""DoRA: one magnitude per output times the direction of `W + scale * A @ B` (Liu et al. 2024, arXiv:2402.09353).

`W' = magnitude * (W + scale A B) / ||W + scale A B||`. The norm is that of each column, over the input axis. It is held
constant in the gradient, as in the paper's section 4.3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import (
    at_least_float32,
    dot,
    dot_to_float32,
    form,
    frozen,
    is_stored,
    materialize,
    trainable,
)
from lowrank.kernels import half_precision_matmul
from lowrank.weights.gains import group_of_rows, scale_product
from lowrank.weights.lora import LoRA


@form
class DoRA(LoRA):
    """A LoRA with `magnitude` `[..., out]` and the cached `base_sq = sum_in W^2` `[..., out]`, both float32."""

    magnitude: jax.Array = trainable(decay=False)
    base_sq: jax.Array = frozen()

    def materialize(self) -> jax.Array:
        """`magnitude * V / ||V||` with `V = W + scale * A @ B`, in the base's dtype."""
        base = materialize(self.base)
        direction = at_least_float32(base) + self.delta()
        norm = jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=-2))
        return (direction * (self.magnitude / norm)[..., None, :]).astype(base.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`(x @ W + scale * drop(x) @ A @ B) * magnitude / norm`, with no `in x out` temporary."""
        gain = self.magnitude / jax.lax.stop_gradient(self.column_norm())
        return scale_product(super().dot_to_float32(x), gain, x.dtype)

    def grouped_to_float32(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """`(x[i] @ W_g + scale_g * drop(x[i]) @ A_g @ B_g) * magnitude_g / norm_g` for rows sorted by group."""
        gain = self.magnitude / jax.lax.stop_gradient(jax.lax.map(DoRA.column_norm, self))
        return scale_product(super().grouped_to_float32(x, sizes), gain, x.dtype, group_of_rows(sizes, len(x)))

    def column_norm(self) -> jax.Array:
        """`||W + scale A B||` of each column `[out]`, in float32, computed from products of rank r only.

        Its square is `||W||^2 + 2 s <W, AB> + s^2 ||AB||^2`, where `<W, AB> = sum_r (A^T W) * B` and
        `||AB||^2 = sum_r B * (A^T A) B`. In bfloat16, cancellation would cost a relative error of 5e-3.
        """
        a, b = (x.astype(jnp.float32) for x in self.factors())
        cross = jnp.sum(_wide_dot(a.T, self.base) * b, axis=-2)
        square = jnp.sum(b * ((a.T @ a) @ b), axis=-2)
        return jnp.sqrt(jnp.maximum(self.base_sq + 2 * self.scale * cross + self.scale**2 * square, 1e-24))


def _wide_dot(x: jax.Array, w: Any) -> jax.Array:
    """`x @ w` in float32 without a float32 copy of a bfloat16 `w`: each float32 of x is the sum of three bfloat16s."""
    if w.dtype != jnp.bfloat16:
        return dot(x, w)
    parts = jnp.concatenate(half_precision_matmul.split(x, w.dtype, 3))
    return jnp.sum(dot_to_float32(parts, w).reshape(3, len(x), -1), axis=0)


def attach(lora: LoRA) -> DoRA:
    """The DoRA with the kernel of `lora`: its magnitudes are the column norms of `W + scale * A @ B`."""
    by_layer = is_stored(lora.base) and len(lora.shape) == 3  # so that one layer is decoded at a time
    magnitude, base_sq = jax.lax.map(_norms, lora) if by_layer else _norms(lora)
    return DoRA(
        **{f.name: getattr(lora, f.name) for f in dataclasses.fields(LoRA)}, magnitude=magnitude, base_sq=base_sq
    )


def _norms(lora: LoRA) -> tuple[jax.Array, jax.Array]:
    """`(||W + scale A B||, ||W||^2)` of each column."""
    base: Any = materialize(lora.base).astype(jnp.float32)
    return jnp.linalg.norm(base + lora.delta(), axis=-2), jnp.sum(base * base, axis=-2)
