"""The product in plain JAX: two products that are added, the reference of the other bodies, or one that is longer.

In every body the product with W is summed in float32, and `t = s (x A)` is rounded to the dtype of `x`. The gradient
`dx` of `x` comes as two parts, that of the update and that of the product with W; their sum is `dx`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.kernels import half_precision_matmul as half
from lowrank.kernels.dispatch import mesh_of

Pair = tuple[jax.Array, jax.Array]  # (result, t)
Parts = tuple[jax.Array, jax.Array, jax.Array]  # (part of dx, the other part, u)


def multiply(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, dtype: Any) -> Pair:
    """`x W + t B` in `dtype`, and `t` in the dtype of `x`. The update is rounded to that of `x`."""
    t = shrink(x, a, scale)
    y = half.matmul_to_float32(x, w)
    return (y + half.matmul(t, b).astype(y.dtype)).astype(dtype), t


def gradient(g: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> Parts:
    """`u A^T`, `g W^T` and `u = s (g B^T)` in the dtype of `g`; each product is rounded to it."""
    u = (half.matmul(g, b.T) * scale).astype(g.dtype)
    return half.matmul(u, a, 1), half.matmul(g, w, 1), u


def multiply_on_tpu(x: jax.Array, w: jax.Array, *others: jax.Array, dtype: Any) -> Pair:
    """`multiply`, as one product where that moves fewer bytes."""
    return (multiply_at_once if _is_shorter(x, w) else multiply)(x, w, *others, dtype=dtype)


def gradient_on_tpu(g: jax.Array, w: jax.Array, *others: jax.Array) -> Parts:
    """`gradient`, as one product where that moves fewer bytes."""
    return (gradient_at_once if _is_shorter(g, w) else gradient)(g, w, *others)


def multiply_at_once(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *, dtype: Any) -> Pair:
    """`multiply` as one product `[x, t] [W; B]`, rounded once.

    A TPU's compiler reads the parts in place: a program has no temporaries, and no sum of products passes through HBM.
    """
    t = shrink(x, a, scale)
    return half.matmul_to_float32(_beside(x, t), _beside(w, b, 0)).astype(dtype), t


def gradient_at_once(g: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> Parts:
    """`gradient` as one product `[g, u] [W, A]^T`, rounded once: the first part is zero."""
    u = shrink(g, b, scale, 1)
    dx = half.matmul_to_float32(_beside(g, u), _beside(w, a), 1).astype(g.dtype)
    return jnp.zeros_like(dx), dx, u


def shrink(x: jax.Array, a: jax.Array, scale: jax.Array, axis: int = 0) -> jax.Array:
    """The product of `x` and `a`, summed over the axis `axis` of `a`, times `scale`: rounded once, to that of `x`."""
    return (half.matmul_to_float32(x, a, axis) * scale).astype(x.dtype)


def _is_shorter(x: jax.Array, w: jax.Array) -> bool:
    """Whether one product moves fewer bytes on a TPU: where no axis of the mesh shards the kernel.

    The axis `data` shards rows alone. As compiled for 16 chips, devices that hold parts of a kernel exchange more bytes
    where B lies below it. Where the kernel alone is in half precision, one product would round `t` and B to it.
    """
    sharded = any(size > 1 for axis, size in mesh_of((x, w)).shape.items() if axis != "data")
    return not sharded and (x.dtype == w.dtype or x.dtype in half.HALF)


def _beside(wide: jax.Array, narrow: jax.Array, axis: int = -1) -> jax.Array:
    return jnp.concatenate([wide, narrow.astype(wide.dtype)], axis)
