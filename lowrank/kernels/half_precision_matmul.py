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
from typing import Any

import jax
import jax.numpy as jnp

HALF = (jnp.bfloat16, jnp.float16)


def matmul(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """The product of `x` and `w` in the dtype of `x`; a float32 `x` takes bfloat16 `w` as `_mixed` describes."""
    if is_mixed(x, w):
        return _mixed(x, w, axis)
    w = w.astype(x.dtype)
    return _bfloat16(x, w, axis) if x.dtype == jnp.bfloat16 and w.ndim == 2 else _contract(x, w, axis)


def matmul_to_float32(x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """The product of `x` and `w` in float32, or in float64 for such `x`, at the cost of a product in the dtype of `x`.

    For half-precision operands, the result is not rounded, and the gradient is rounded before it is multiplied. So
    every product, forward and backward, has half-precision operands.
    """
    if is_mixed(x, w):
        return _mixed(x, w, axis)
    return (_half_to_float32 if x.dtype in HALF else _to_float32)(x, w, axis)


def matmul_in(dtype: Any, x: jax.Array, w: jax.Array, axis: int = 0) -> jax.Array:
    """The product of `x` and `w` in `dtype`, which is that of `x` or, for half-precision `x`, float32."""
    return (matmul if dtype == x.dtype else matmul_to_float32)(x, w, axis)


def split(x: jax.Array, dtype: Any, parts: int) -> list[jax.Array]:
    """Arrays of the half-precision `dtype` whose sum is `x`, in float32, to about `parts` times its precision."""
    precision, pieces = jnp.finfo(dtype), []
    for _ in range(parts):
        # The compiler might remove a cast to half precision and back.
        piece = jax.lax.reduce_precision(x, exponent_bits=precision.nexp, mantissa_bits=precision.nmant)
        pieces.append(piece.astype(dtype))
        x = x - piece
    return pieces


def _contract(x: jax.Array, w: jax.Array, axis: int, out: Any = None) -> jax.Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=out)


def _to_float32(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    return _contract(x, w.astype(x.dtype), axis, jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _bfloat16(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    narrowed = lambda x, w: _to_float32(x, w, axis).astype(x.dtype)  # noqa: E731
    return jax.lax.platform_dependent(x, w, cpu=narrowed, default=functools.partial(_contract, axis=axis))


_half_to_float32 = jax.custom_vjp(_to_float32, nondiff_argnums=(2,))


def is_mixed(x: Any, w: Any) -> bool:
    """Whether the rows are float32 and the kernel is bfloat16, in which both are multiplied."""
    return x.dtype == jnp.float32 and w.dtype == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mixed(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """The product of float32 `x` and bfloat16 `w` in float32, with bfloat16 operands in both directions.

    The rows `x`, and the gradient in the backward pass, are rounded before they are multiplied, and no product is.
    """
    return _contract(x.astype(w.dtype), w, axis, jnp.float32)


Residuals = tuple[jax.Array | None, jax.Array]


def _forward(multiply: Any, x: Any, w: Any, axis: int) -> tuple[jax.Array, Residuals]:
    """The product and its residuals: `x` is kept only for the gradient of `w`, which a frozen `w` has not."""
    half = x.value.dtype if x.value.dtype in HALF else w.value.dtype
    kept = (x.value.astype(half), w.value) if w.perturbed else (None, w.value.astype(half))
    return multiply(x.value, w.value, axis), kept


def _backward(out: Any, wide: bool, axis: int, residuals: Residuals, g: Any) -> tuple[jax.Array, jax.Array | None]:
    """The gradients of `x`, in float32 if `wide`, and of `w`, summed and exchanged between devices in `out`."""
    x, w = residuals
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    g, rows = g.astype(w.dtype if x is None else x.dtype), tuple(range(g.ndim - 1))
    dx = (matmul_to_float32 if wide else matmul)(g, w, 1 - axis)
    if x is None:
        return dx, None
    pair = (x, g) if axis == 0 else (g, x)
    dw = jax.lax.dot_general(pair[0], pair[1], ((rows, rows), ((), ())), preferred_element_type=out)
    return dx, dw.astype(w.dtype)


for _product, _multiply, _out, _wide in (
    (_bfloat16, _bfloat16, None, False),
    (_half_to_float32, _to_float32, jnp.float32, False),
    (_mixed, _mixed, jnp.float32, True),
):
    _product.defvjp(
        functools.partial(_forward, _multiply), functools.partial(_backward, _out, _wide), symbolic_zeros=True
    )
