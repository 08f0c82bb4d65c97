"""`x @ w` in bfloat16, in a form that a CPU's compiler multiplies as bfloat16.

Asked for a bfloat16 product, XLA on CPUs widens both operands to float32 first, of a scanned layer the whole stack. A
float32 product of bfloat16 operands it leaves alone; rounded afterwards it is the same, in a third of the time where
the CPU has instructions for it. Shapes: `x` `[..., n]`, `w` `[in, out]`.
"""

import functools

import jax
import jax.numpy as jnp


def dot(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """`x` times `w` over the `axis` of `w` that is n (0: `x @ w`, 1: `x @ w.T`), in the dtype of `x`.

    In bfloat16 it is differentiable in reverse mode alone.
    """
    w = w.astype(x.dtype)
    return _rounded(x, w, axis) if x.dtype == jnp.bfloat16 and w.ndim == 2 else _plain(x, w, axis)


def _plain(x: jax.Array, w: jax.Array, axis: int, out: type | None = None) -> jax.Array:
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    wide = lambda x, w: _plain(x, w, axis, jnp.float32).astype(x.dtype)  # noqa: E731
    return jax.lax.platform_dependent(x, w, cpu=wide, default=functools.partial(_plain, axis=axis))


def _forward(x: jax.Array, w: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded(x, w, axis), (x, w)


def _backward(axis: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    rows = tuple(range(x.ndim - 1))
    pair = (x, g) if axis == 0 else (g, x)
    return _rounded(g, w, 1 - axis), jax.lax.dot_general(*pair, ((rows, rows), ((), ())))


_rounded.defvjp(_forward, _backward)
