"""A kernel in the storage of any quantizer: ModuLoRA's base (Yin et al. 2023, arXiv:2309.16119).

The form uses `decode(state) -> [in, out]` of the quantizer and nothing else. The forward and the backward product both
dequantize the whole kernel, not tiles of it, and the residuals hold the state only.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError
from lowrank.core.weight import KERNEL, Weight, form, frozen, static
from lowrank.kernels import half_precision_matmul
from lowrank.weights.quantized.base import zero_cotangents

BlackBoxQuantizer = Callable[[jax.Array], tuple[Any, Callable[[Any], jax.Array]]]


@form
class BlackBox(Weight):
    """`state` holds the quantizer's arrays, and `unit` is the shape `(in, out)` of one kernel."""

    state: Any = frozen(axes=KERNEL)
    decode: Callable[[Any], jax.Array] = static()
    unit: tuple[int, ...] = static()
    axes: int = static()  # the number of axes of the first array of one kernel's state
    dtype_name: str = static()

    stored: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        first = jax.tree.leaves(self.state)[0]
        return (*first.shape[: first.ndim - self.axes], *self.unit)

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel that was quantized."""
        return jnp.dtype(self.dtype_name)

    def materialize(self) -> jax.Array:
        """The dequantized kernel, or stack of kernels."""
        decode = self.decode
        for _ in self.shape[:-2]:
            decode = jax.vmap(decode)
        return decode(self.state).astype(self.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W`."""
        return _product(x, self, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: BlackBox, dtype: Any) -> jax.Array:
    del dtype  # that of x, to which the gradient is rounded before it is multiplied
    return half_precision_matmul.matmul_to_float32(x, w.materialize())


def _backward(dtype: Any, w: BlackBox, g: jax.Array) -> tuple[jax.Array, Any]:
    dx = half_precision_matmul.matmul(g.astype(dtype), w.materialize(), 1)
    return dx, zero_cotangents(w)


_product.defvjp(lambda x, w, dtype: (_product(x, w, dtype), w), _backward)


def absmax(kernel: jax.Array) -> tuple[Any, Callable[[Any], jax.Array]]:
    """An example of a quantizer: 8 bits, scaled by the largest magnitude of each output."""
    largest = jnp.max(jnp.abs(kernel), axis=0, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return (jnp.round(kernel / jnp.broadcast_to(scale, kernel.shape)).astype(jnp.int8), scale), _times


def _times(state: Any) -> jax.Array:
    codes, scale = state
    return codes * jnp.broadcast_to(scale, codes.shape)


def attach(w: jax.Array, quantize: BlackBoxQuantizer, where: str) -> BlackBox:
    """The kernel `w` `[..., in, out]` in the storage of `quantize`, which errors call `where`.

    Raises UserError if the quantizer's state has no arrays, or does not decode to the kernel's shape.
    """
    decoders, unit = [], w.shape[-2:]

    def quantize_one(kernel: jax.Array) -> Any:
        state, decode = quantize(kernel)
        decoders.append(decode)
        return state

    state = jax.eval_shape(quantize_one, jax.ShapeDtypeStruct(unit, w.dtype))
    if not jax.tree.leaves(state):
        raise UserError(f"{where} keeps no arrays: it must return (arrays, decode)")
    decode = decoders[0]
    decoded = jax.eval_shape(decode, state).shape
    if decoded != unit:
        raise UserError(f"{where} decodes a kernel {unit} to {decoded}: its decode must return the kernel's shape")
    over_stack = quantize_one
    for _ in w.shape[:-2]:  # one layer at a time
        over_stack = (lambda inner: lambda stack: jax.lax.map(inner, stack))(over_stack)
    axes = jax.tree.leaves(state)[0].ndim
    return BlackBox(state=over_stack(w), decode=decode, unit=unit, axes=axes, dtype_name=jnp.dtype(w.dtype).name)
