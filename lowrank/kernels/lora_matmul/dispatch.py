"""The product with a low-rank update and its gradient, of which the backward pass keeps what it needs alone."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lowrank.kernels import half_precision_matmul as half
from lowrank.kernels.dispatch import Operation
from lowrank.kernels.lora_matmul import gpu, plain, tpu

_FORWARD = Operation(
    "lora_matmul",
    xla={"tpu": plain.multiply_on_tpu, "default": plain.multiply},
    pallas_tpu=tpu.multiply,
    pallas_gpu=gpu.multiply,
)
_BACKWARD = Operation(
    "lora_matmul",
    xla={"tpu": plain.gradient_on_tpu, "default": plain.gradient},
    pallas_tpu=tpu.gradient,
    pallas_gpu=gpu.gradient,
)
CHECKS = {"pallas_tpu": tpu.check, "pallas_gpu": gpu.check}


class _Static(NamedTuple):
    """The arguments that are not arrays."""

    dtype: Any  # of the result
    inner: Any  # the dtype of `x`
    name: str
    implementation: str


def lora_matmul(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    *,
    dtype: Any = None,
    name: str = "",
    implementation: str = "auto",
) -> jax.Array:
    """`x W + s (x A) B` `[..., out]` in `dtype`, by default that of `x`; differentiable in reverse mode only.

    For the gradient of A the backward pass keeps `x`, and for that of B it keeps `s (x A)` `[..., r]`, with the
    checkpoint name `name`. So it keeps no input where A is frozen, as in LoRA-FA. A kernel that is not differentiated
    has no gradient, and none is computed. Raises UserError for arrays that a named body cannot take.
    """
    if implementation in CHECKS:
        CHECKS[implementation](x.dtype)
    static = _Static(jnp.dtype(x.dtype if dtype is None else dtype), x.dtype, name, implementation)
    # `x` is given twice: autodiff adds the two parts of its gradient to those of other products, one after the other.
    return _product(static, x, x, w, a, b, scale)


def _multiply(static: _Static, *arrays: Any) -> tuple[jax.Array, jax.Array]:
    return _FORWARD(*arrays, dtype=static.dtype, implementation=static.implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: _Static, _: Any, *arrays: Any) -> jax.Array:
    return _multiply(static, *arrays)[0]


def _forward(static: _Static, _: Any, *args: Any) -> tuple[jax.Array, Any]:
    """The product, and the residuals: None for each that no gradient needs."""
    x, w, a, b, scale = args
    y, t = _multiply(static, *(arg.value for arg in args))
    named = checkpoint_name(t, static.name) if static.name else t
    others = {name: None for name, arg in (("w", w), ("scale", scale)) if arg.perturbed}  # keys stay static
    kept = x.value if a.perturbed or others else None
    return y, (kept, w.value, a.value, b.value, scale.value, named if b.perturbed else None, others)


def _backward(static: _Static, residuals: tuple[Any, ...], g: Any) -> tuple[Any, ...]:
    x, w, a, b, scale, t, others = residuals
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    rounded = g.astype(static.inner)
    *dx, u = _BACKWARD(rounded, w, a, b, scale, implementation=static.implementation)
    da = _pull(lambda a: half.matmul_to_float32(x, a), a, u) if x is not None else None
    db = _outer(t, rounded, b) if t is not None else None
    more = {}
    if others:
        given = {"w": w, "scale": scale}
        of = lambda some: plain.multiply(x, a=a, b=b, **(given | some), dtype=g.dtype)[0]  # noqa: E731
        more = _pull(of, {name: given[name] for name in others}, g)
    return *dx, more.get("w"), da, db, more.get("scale")


def _pull(function: Any, at: Any, g: jax.Array) -> Any:
    """The gradient of the sum of `g * function(at)`."""
    y, pullback = jax.vjp(function, at)
    return pullback(g.astype(y.dtype))[0]


def _outer(t: jax.Array, g: jax.Array, b: jax.Array) -> jax.Array:
    """`t^T g` `[r, out]`, in the order in which no wide array is transposed; summed in the wider dtype."""
    rows = tuple(range(t.ndim - 1))
    db = jax.lax.dot_general(t, g, ((rows, rows), ((), ())), preferred_element_type=jnp.result_type(t, b))
    return db.astype(b.dtype)


_product.defvjp(_forward, _backward, symbolic_zeros=True)
