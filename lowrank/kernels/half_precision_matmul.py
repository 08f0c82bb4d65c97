"""Products of half-precision arrays, written so that a CPU's compiler multiplies them in half precision too.

XLA on CPUs converts both operands of a bfloat16 product to float32 first; for a scanned layer it converts the whole
stack. XLA leaves a product alone whose operands are bfloat16 and whose result is float32. Rounding that result gives
the same values, in a third of the time on a CPU that has bfloat16 instructions.

Three policies of precision follow from the dtypes of `x` and `w`: float32, bfloat16, and bfloat16 weights with float32
activations, which costs the time of bfloat16 and rounds operands alone.

Shapes: `x` is `[..., n]` and `w` is `[in, out]`. The argument `axis` says which axis of `w` is summed over and has the
size n: 0 for `x @ w`, 1 for `x @ w.T`. In half precision the products are differentiable in reverse mode only.
"""

import functools

import jax
import jax.numpy as jnp

HALF = (jnp.bfloat16, jnp.float16)


def matmul(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """The product of `x` and `w` in the dtype of `x`; a float32 `x` takes bfloat16 `w` as `_mixed` describes."""
    if _is_mixed(x, w):
        return _mixed(x, w, axis)
    w = w.astype(x.dtype)
    return _bfloat16(x, w, axis) if x.dtype == jnp.bfloat16 and w.ndim == 2 else _contract(x, w, axis)


def matmul_to_float32(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """The product of `x` and `w` in float32, at the cost of a product in the dtype of `x`.

    For half-precision operands, the result is not rounded, and the gradient is rounded before it is multiplied. So
    every product, forward and backward, has half-precision operands.
    """
    if _is_mixed(x, w):
        return _mixed(x, w, axis)
    return (_half_to_float32 if x.dtype in HALF else _to_float32)(x, w, axis)


def _contract(x: jax.Array, w: jax.Array, axis: int, out: type | None = None) -> jax.Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=out)


def _to_float32(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    return _contract(x, w.astype(x.dtype), axis, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _bfloat16(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    narrowed = lambda x, w: _to_float32(x, w, axis).astype(x.dtype)  # noqa: E731
    return jax.lax.platform_dependent(x, w, cpu=narrowed, default=functools.partial(_contract, axis=axis))


_half_to_float32 = jax.custom_vjp(_to_float32, nondiff_argnums=(2,))


def _is_mixed(x: jax.Array, w: jax.Array) -> bool:
    return x.dtype == jnp.float32 and w.dtype == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mixed(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """The product of float32 `x` and bfloat16 `w` in float32, with bfloat16 operands in both directions.

    The rows `x`, and the gradient in the backward pass, are rounded before they are multiplied, and no product is.
    """
    return _contract(x.astype(w.dtype), w, axis, jnp.float32)


def _mixed_backward(axis: int, residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, dw = _backward(jnp.float32, axis, residuals, g)
    return _contract(g.astype(jnp.bfloat16), residuals[1], 1 - axis, jnp.float32), dw


_mixed.defvjp(lambda x, w, axis: (_mixed(x, w, axis), (x.astype(w.dtype), w)), _mixed_backward)


def _backward(
    out: type | None, axis: int, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `x` and `w`; that of `w` is summed, and exchanged between devices, in the dtype `out`."""
    x, w = residuals
    g, rows = g.astype(x.dtype), tuple(range(x.ndim - 1))
    pair = (x, g) if axis == 0 else (g, x)
    dw = jax.lax.dot_general(*pair, ((rows, rows), ((), ())), preferred_element_type=out)
    return matmul(g, w, 1 - axis), dw.astype(w.dtype)


_bfloat16.defvjp(lambda x, w, axis: (_bfloat16(x, w, axis), (x, w)), functools.partial(_backward, None))
_half_to_float32.defvjp(lambda x, w, axis: (_to_float32(x, w, axis), (x, w)), functools.partial(_backward, jnp.float32))
