"""A kernel that any quantiser keeps: ModuLoRA's base (Yin et al. 2023, arXiv:2309.16119).

All that is known of the quantiser is `decode(state) -> [in, out]`. The forward and the backward product both decode,
and only the state is saved between them; unlike the forms of this library they decode the kernel whole.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.weight import KERNEL, Weight, form, frozen, static
from lowrank.kernels import half_precision_matmul

BlackBoxQuantizer = Callable[[jax.Array], tuple[Any, Callable[[Any], jax.Array]]]


@form
class BlackBox(Weight):
    """`state` is the quantiser's arrays, `unit` the `(in, out)` of one kernel."""

    state: Any = frozen(axes=KERNEL)
    decode: Callable[[Any], jax.Array] = static()
    unit: tuple[int, ...] = static()
    axes: int = static()  # of the first array of one kernel's state
    dtype_name: str = static()

    stored: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        first = jax.tree.leaves(self.state)[0]
        return (*first.shape[: first.ndim - self.axes], *self.unit)

    @property
    def dtype(self) -> Any:
        """That of the kernel it was made from."""
        return jnp.dtype(self.dtype_name)

    def materialize(self) -> jax.Array:
        """The decoded kernel, or a stack of them."""
        decode = self.decode
        for _ in self.shape[:-2]:
            decode = jax.vmap(decode)
        return decode(self.state).astype(self.dtype)

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ W`."""
        return _product(x, self)


@jax.custom_vjp
def _product(x: jax.Array, w: BlackBox) -> jax.Array:
    return half_precision_matmul.matmul(x, w.materialize())


def _backward(w: BlackBox, g: jax.Array) -> tuple[jax.Array, Any]:
    dx = half_precision_matmul.matmul(g, w.materialize(), 1)
    return dx, jax.tree.map(_nothing, w)


def _nothing(leaf: jax.Array) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)


_product.defvjp(lambda x, w: (_product(x, w), w), _backward)


def absmax(kernel: jax.Array) -> tuple[Any, Callable[[Any], jax.Array]]:
    """An example of a quantiser: 8 bits by the largest magnitude of each output."""
    top = jnp.max(jnp.abs(kernel), axis=0, keepdims=True).astype(jnp.float32)
    scale = jnp.where(top > 0, top / 127, 1)
    return (jnp.round(kernel / jnp.broadcast_to(scale, kernel.shape)).astype(jnp.int8), scale), _times


def _times(state: Any) -> jax.Array:
    codes, scale = state
    return codes * jnp.broadcast_to(scale, codes.shape)


def attach(w: jax.Array, quantise: BlackBoxQuantizer, where: str) -> BlackBox:
    """What `quantise` makes of a kernel `[..., in, out]`. Raises UserError if it does not decode to that shape."""
    decoders, inner = [], w.shape[-2:]

    def one(kernel: jax.Array) -> Any:
        state, decode = quantise(kernel)
        decoders.append(decode)
        return state

    unit = jax.eval_shape(one, jax.ShapeDtypeStruct(inner, w.dtype))
    if not jax.tree.leaves(unit):
        raise UserError(f"{where} keeps no arrays")
    decode = decoders[0]
    made = jax.eval_shape(decode, unit).shape
    if made != inner:
        raise UserError(f"{where} decodes a kernel {inner} to {made}")
    over = one
    for _ in w.shape[:-2]:  # one layer at a time
        over = (lambda inside: lambda stack: jax.lax.map(inside, stack))(over)
    return BlackBox(
        state=over(w), decode=decode, unit=inner, axes=jax.tree.leaves(unit)[0].ndim, dtype_name=jnp.dtype(w.dtype).name
    )
