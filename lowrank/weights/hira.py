"""HiRA: `W * (1 + A @ B)` entry by entry, an update of high rank (Huang et al., ICLR 2025, openreview TwJrTz9cRS).

There is no scale, since a larger A or B has its effect. Kernels are `[in, out]`, so A is `[in, r]` and B is `[r, out]`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import KERNEL, Weight, at_least_float32, dot_to_float32, form, frozen, materialize, trainable
from lowrank.weights import stacked_layers


@form
class HiRA(Weight):
    """`base` `[..., in, out]`, `a` `[..., in, r]`, `b` `[..., r, out]`."""

    base: Any = frozen(axes=KERNEL)
    a: jax.Array = trainable(axes=("in", None))
    b: jax.Array = trainable(axes=(None, "out"))

    def materialize(self) -> jax.Array:
        """`W * (1 + A @ B)`, in float32 and rounded once to the base's dtype."""
        return _fused(self.base, self.a, self.b, "highest")

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ (W * (1 + A @ B))`: one product with a kernel `[in, out]` that is formed for it, in the base's dtype.

        No cheaper way is known, because W has full rank. The backward pass recomputes the kernel.
        """
        return _dot(x, self.base, self.a, self.b)


def _fused(base: Any, a: jax.Array, b: jax.Array, precision: str | None = None) -> jax.Array:
    w = materialize(base)
    return (
        at_least_float32(w) * (1 + jnp.matmul(at_least_float32(a), at_least_float32(b), precision=precision))
    ).astype(w.dtype)


@jax.checkpoint
def _dot(x: jax.Array, base: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return dot_to_float32(x, _fused(base, a, b))


def attach(key: jax.Array, w: Any, *, ranks: Sequence[int]) -> HiRA:
    """A HiRA on `w` `[..., in, out]` that starts as the identity: B is zero and A is Kaiming uniform.

    There is one rank per layer of the stack (one if `w` is not stacked); a rank of 0 leaves its layer unadapted.
    """
    stack, (n_in, n_out), rank = w.shape[:-2], w.shape[-2:], max(ranks)
    a = (
        stacked_layers.kaiming_uniform(key, (*stack, n_in, rank), n_in)
        * stacked_layers.rank_mask(ranks, stack)[..., None, :]
    )
    return HiRA(base=w, a=a, b=jnp.zeros((*stack, rank, n_out), jnp.float32))
