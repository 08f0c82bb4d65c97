"""Learned gains of activations: multiplied in float32, without float32 residuals.

A gain in half precision would lose most of its updates: next to 1, bfloat16 holds steps of 0.4 % only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import at_least_float32, name_product

Residuals = tuple[jax.Array, jax.Array, jax.Array | None]


def scale(y: jax.Array, gain: jax.Array, saved: jax.Array, groups: jax.Array | None = None) -> jax.Array:
    """`y * gain` for `y` `[..., n]` in float32 or wider and a gain that broadcasts to it.

    With `groups` `[rows]`, the gain is `[G, n]`, and each row is multiplied by that of its group. The backward pass
    keeps `saved`, which is `y` in the dtype of the activations, in place of `y`. The gradient of the gain is summed in
    the dtype of `y`.
    """
    return _times(saved, gain, groups) if y.dtype == saved.dtype else _scale(y, gain, saved, groups)


@jax.custom_vjp
def _scale(y: jax.Array, gain: jax.Array, saved: jax.Array, groups: jax.Array | None) -> jax.Array:
    del saved
    return _times(y, gain, groups)


def _scale_fwd(
    y: jax.Array, gain: jax.Array, saved: jax.Array, groups: jax.Array | None
) -> tuple[jax.Array, Residuals]:
    return _times(y, gain, groups), (gain, saved, groups)


def _scale_bwd(residuals: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    gain, saved, groups = residuals
    dy, dgain = jax.vjp(lambda y, gain: _times(y, gain, groups), saved.astype(g.dtype), gain)[1](g)
    return dy, dgain, None, None


_scale.defvjp(_scale_fwd, _scale_bwd)


def _times(y: jax.Array, gain: jax.Array, groups: jax.Array | None) -> jax.Array:
    gain = (gain if groups is None else gain[groups]).astype(y.dtype)
    return y * (gain if gain.ndim == y.ndim else jnp.broadcast_to(gain, y.shape))


def scale_product(y: jax.Array, gain: jax.Array, dtype: Any, groups: jax.Array | None = None) -> jax.Array:
    """`scale` for a product `y` in float32 or wider, of which the backward pass keeps a copy in `dtype`."""
    return scale(y, gain, name_product(y.astype(dtype)), groups)


def scale_rounded(x: jax.Array, gain: jax.Array) -> jax.Array:
    """`x * gain`, multiplied in float32 or wider and rounded once, to the dtype of `x`."""
    return scale(at_least_float32(x), gain, x).astype(x.dtype)


def group_of_rows(sizes: jax.Array, rows: int) -> jax.Array:
    """The group int32 `[rows]` of each of the rows that are sorted by group, `sizes` `[G]` of each."""
    return jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=rows)
