"""AdaLoRA: `W + scale * A @ diag(E) @ B`, an update shaped like an SVD (Zhang et al. 2023, arXiv:2303.10512).

A, E and B are the paper's Q, Lambda and P, transposed because kernels are `[in, out]`. Column k of A, entry k of E and
row k of B form a triplet. A triplet whose entry of E is 0 is pruned, and so the layers of a stack get different ranks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.weight import at_least_float32, dot_to_float32, form, trainable
from lowrank.weights.gains import scale_product
from lowrank.weights.lora import LoRA, project_up


@form
class AdaLoRA(LoRA):
    """A LoRA with `e` `[..., r]` between its factors; `scale` is alpha / (initial rank), however many were pruned."""

    e: jax.Array = trainable(decay=False)

    def delta(self) -> jax.Array:
        """The update `scale * A @ diag(E) @ B`, `[..., in, out]` in float32 or wider."""
        a = at_least_float32(self.a) * at_least_float32(self.e)[..., None, :]
        return jnp.matmul(a, at_least_float32(self.b), precision="highest") * self.scale[..., None, None]

    def low_rank_update(self, x: jax.Array) -> jax.Array:
        """`scale * (drop(x) @ A) * E @ B` for `x: [..., in]`."""
        t = scale_product(dot_to_float32(self._drop(x), self.a), at_least_float32(self.e) * self.scale, x.dtype)
        return project_up(t.astype(x.dtype), self.b)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`(A @ diag(E), B)`."""
        return at_least_float32(self.a) * at_least_float32(self.e)[..., None, :], self.b

    def orthogonality(self) -> jax.Array:
        """`||A^T A - I||^2 + ||B B^T - I||^2` (Frobenius), summed over the stack: 0 for a true decomposition."""
        a, b = at_least_float32(self.a), at_least_float32(self.b)
        return _distance(jnp.swapaxes(a, -1, -2) @ a) + _distance(b @ jnp.swapaxes(b, -1, -2))


def _distance(gram: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(gram - jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)))


def attach(key: jax.Array, w: Any, *, rank: int, alpha: float, dropout: float = 0.0) -> AdaLoRA:
    """An AdaLoRA of rank `rank` on `w` `[..., in, out]`, with Gaussian A and B and with E = 0.

    The standard deviation of the entries is `width ** -0.5`. So the triplets start near unit length, which the
    orthogonality penalty asks for, at any width; the authors' constant 0.02 is the value for a width of 2500.
    """
    stack, (n_in, n_out) = w.shape[:-2], w.shape[-2:]
    a_key, b_key = jax.random.split(key)
    return AdaLoRA(
        base=w,
        a=jax.random.normal(a_key, (*stack, n_in, rank)) * n_in**-0.5,
        b=jax.random.normal(b_key, (*stack, rank, n_out)) * n_out**-0.5,
        scale=jnp.full(stack, alpha / rank, jnp.float32),
        dropout=dropout,
        e=jnp.zeros((*stack, rank), jnp.float32),
    )
