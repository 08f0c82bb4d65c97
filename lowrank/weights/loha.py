"""LoHa: `W + scale * (A1 @ B1) * (A2 @ B2)`, the product of two low-rank updates entry by entry.

The form is FedPara's (Hyeon-Woo et al. 2021, arXiv:2108.06098); LyCORIS uses it for fine-tuning (Yeh et al. 2023,
arXiv:2309.14859). Two updates of rank r give one update of rank up to r^2. Kernels are `[in, out]`, so each A is
`[in, r]` and each B is `[r, out]`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot,
    dot_to_float32,
    form,
    frozen,
    materialize,
    name_product,
    trainable,
)
from lowrank.weights import stacked_layers
from lowrank.weights.lora import project_up


@form
class LoHa(Weight):
    """`base` `[..., in, out]`, `a1`, `a2` `[..., in, r]`, `b1`, `b2` `[..., r, out]`, `scale` `[...]`."""

    base: Any = frozen(axes=KERNEL)
    a1: jax.Array = trainable(axes=("in", None))
    b1: jax.Array = trainable(axes=(None, "out"))
    a2: jax.Array = trainable(axes=("in", None))
    b2: jax.Array = trainable(axes=(None, "out"))
    scale: jax.Array = frozen()

    def materialize(self) -> jax.Array:
        """`W + scale * (A1 @ B1) * (A2 @ B2)`, summed in float32 and rounded once to the base's dtype."""
        base = materialize(self.base)
        pairs = ((self.a1, self.b1), (self.a2, self.b2))
        first, second = (jnp.matmul(at_least_float32(a), at_least_float32(b), precision="highest") for a, b in pairs)
        return (at_least_float32(base) + first * second * self.scale[..., None, None]).astype(base.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W` plus the update, which is computed as factors of rank r^2 where these are smaller than `in x out`.

        `(A1 @ B1) * (A2 @ B2) = A @ B` with `A[i, pq] = A1[i, p] A2[i, q]` and `B[pq, o] = B1[p, o] B2[q, o]`.
        Where the update `in x out` is smaller than the factors, it is formed, and the backward pass recomputes it. In
        half precision, the update that is formed, or else A, B and `x @ A`, and their products are rounded.
        """
        (n_in, n_out), rank = self.shape, self.a1.shape[-1]
        if rank**2 * (n_in + n_out) > n_in * n_out:
            update = at_least_float32(_product(x, self.a1, self.b1, self.a2, self.b2))
            return dot_to_float32(x, self.base) + update * self.scale
        a = jnp.einsum("ip,iq->ipq", self.a1, self.a2).reshape(n_in, rank**2)
        b = jnp.einsum("po,qo->pqo", self.b1, self.b2).reshape(rank**2, n_out)
        y = dot_to_float32(x, self.base)
        t = (dot_to_float32(x, a) * self.scale).astype(x.dtype)
        return y + at_least_float32(project_up(name_product(t), b))


@jax.checkpoint
def _product(x: jax.Array, a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array) -> jax.Array:
    return dot(x, (a1 @ b1) * (a2 @ b2))


def attach(key: jax.Array, w: Any, *, ranks: Sequence[int], alphas: Sequence[float]) -> LoHa:
    """A LoHa on `w` `[..., in, out]` that starts as the identity: A2 is zero, the others are Kaiming uniform.

    There is one rank and one alpha per layer of the stack (one if `w` is not stacked); a rank of 0 leaves its layer
    unadapted.
    """
    stack, (n_in, n_out), rank = w.shape[:-2], w.shape[-2:], max(ranks)
    live, (key_a, key_1, key_2) = stacked_layers.rank_mask(ranks, stack), jax.random.split(key, 3)
    return LoHa(
        base=w,
        a1=stacked_layers.kaiming_uniform(key_a, (*stack, n_in, rank), n_in) * live[..., None, :],
        b1=stacked_layers.kaiming_uniform(key_1, (*stack, rank, n_out), rank) * live[..., :, None],
        a2=jnp.zeros((*stack, n_in, rank), jnp.float32),
        b2=stacked_layers.kaiming_uniform(key_2, (*stack, rank, n_out), rank) * live[..., :, None],
        scale=stacked_layers.lora_scales(ranks, alphas, stack),
    )
