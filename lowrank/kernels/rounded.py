"""`x @ w` in half precision, in a form that a CPU's compiler multiplies in half precision.

Asked for a bfloat16 product, XLA on CPUs widens both operands to float32 first, of a scanned layer the whole stack. A
float32 product of bfloat16 operands it leaves alone; rounded afterwards it is the same, in a third of the time where
the CPU has instructions for it. Shapes: `x` `[..., n]`, `w` `[in, out]`; `axis` is the one of `w` that is n: 0 for
`x @ w`, 1 for `x @ w.T`. In half precision a product is differentiable in reverse mode alone.
"""

import functools

import jax
import jax.numpy as jnp

HALF = (jnp.bfloat16, jnp.float16)


def dot(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """`x` times `w` in the dtype of `x`."""
    w = w.astype(x.dtype)
    return _rounded(x, w, axis) if x.dtype == jnp.bfloat16 and w.ndim == 2 else _plain(x, w, axis)


def wide(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """`x` times `w` in float32, at the price of a product in the dtype of `x`.

    In half precision nothing is rounded on the way out, and on the way back the gradient is rounded before it is
    multiplied, so that every product is one of half precision.
    """
    return (_wide if x.dtype in HALF else _float32)(x, w, axis)


def _plain(x: jax.Array, w: jax.Array, axis: int, out: type | None = None) -> jax.Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=out)


def _float32(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    return _plain(x, w.astype(x.dtype), axis, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    narrowed = lambda x, w: _float32(x, w, axis).astype(x.dtype)  # noqa: E731
    return jax.lax.platform_dependent(x, w, cpu=narrowed, default=functools.partial(_plain, axis=axis))


_wide = jax.custom_vjp(_float32, nondiff_argnums=(2,))


def _back(out: type | None, axis: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of `x` and `w`, the latter summed and sent in `out`."""
    x, w = saved
    g, rows = g.astype(x.dtype), tuple(range(x.ndim - 1))
    pair = (x, g) if axis == 0 else (g, x)
    dw = jax.lax.dot_general(*pair, ((rows, rows), ((), ())), preferred_element_type=out)
    return dot(g, w, 1 - axis), dw.astype(w.dtype)


_rounded.defvjp(lambda x, w, axis: (_rounded(x, w, axis), (x, w)), functools.partial(_back, None))
_wide.defvjp(lambda x, w, axis: (_float32(x, w, axis), (x, w)), functools.partial(_back, jnp.float32))
