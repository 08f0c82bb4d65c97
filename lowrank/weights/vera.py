"""VeRA: `W + A diag(lambda_d) B diag(lambda_b)` with shared random A and B (Kopiczko et al. 2023, arXiv:2310.11454).

Only the two vectors of each weight are learned. A `[max in, r]` and B `[r, max out]` are drawn once, for the largest of
the adapted kernels; each kernel uses the first rows of A and the first columns of B.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank.core.errors import UserError
from lowrank.core.weight import (
    KERNEL,
    Weight,
    at_least_float32,
    dot,
    dot_to_float32,
    form,
    frozen,
    materialize,
    trainable,
)
from lowrank.weights.gains import scale, scale_product


@form
class VeRA(Weight):
    """`base` `[..., in, out]`, `lambda_d` `[..., r]`, `lambda_b` `[..., out]`; `a` `[..., in, r]`, `b` `[..., r, out]`.

    A and B are None until `with_projections` sets them.
    """

    base: Any = frozen(axes=KERNEL)
    lambda_d: jax.Array = trainable(decay=False)
    lambda_b: jax.Array = trainable(decay=False)
    a: jax.Array | None = frozen(default=None)
    b: jax.Array | None = frozen(default=None)

    def materialize(self) -> jax.Array:
        """`W + A diag(lambda_d) B diag(lambda_b)`, summed in float32 and rounded once to the base's dtype."""
        a, b = self._shared()
        base = materialize(self.base)
        update = jnp.matmul(at_least_float32(a) * self.lambda_d[..., None, :], at_least_float32(b), precision="highest")
        return (at_least_float32(base) + update * self.lambda_b[..., None, :]).astype(base.dtype)

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x @ W + (((x @ A) * lambda_d) @ B) * lambda_b`.

        In half precision, A, B, `(x @ A) * lambda_d` and its product with B are rounded.
        """
        a, b = self._shared()
        y = dot_to_float32(x, self.base)
        t = scale_product(dot_to_float32(x, a), self.lambda_d, x.dtype).astype(x.dtype)
        update = dot(t, b)
        return y + scale(at_least_float32(update), self.lambda_b, update)

    def _shared(self) -> tuple[jax.Array, jax.Array]:
        if self.a is None or self.b is None:
            raise UserError("a VeRA has no matrices A and B, which all weights share: apply the method's `bind` first")
        return self.a, self.b


def attach(w: Any, rank: int, d_initial: float) -> VeRA:
    """A VeRA on `w` `[..., in, out]` that starts as the identity: `lambda_b` is zero and `lambda_d` is `d_initial`."""
    lambda_d = jnp.full((*w.shape[:-2], rank), d_initial, jnp.float32)
    return VeRA(base=w, lambda_d=lambda_d, lambda_b=jnp.zeros((*w.shape[:-2], w.shape[-1]), jnp.float32))


def random_projections(key: jax.Array, rank: int, n_in: int, n_out: int) -> dict[str, jax.Array]:
    """Random `{a: [in, r], b: [r, out]}`, Kaiming uniform."""
    key_a, key_b = jax.random.split(key)
    bound_a, bound_b = (6 / n_in) ** 0.5, (6 / rank) ** 0.5
    return {
        "a": jax.random.uniform(key_a, (n_in, rank), minval=-bound_a, maxval=bound_a),
        "b": jax.random.uniform(key_b, (rank, n_out), minval=-bound_b, maxval=bound_b),
    }


def with_projections(w: VeRA, a: jax.Array, b: jax.Array) -> VeRA:
    """`w` with its rows of A and its columns of B, repeated for every layer of a stack, since a scan slices them."""
    n_in, n_out = w.shape[-2:]
    a, b = (jnp.broadcast_to(x, (*w.shape[:-2], *x.shape)) for x in (a[:n_in], b[:, :n_out]))
    return VeRA(base=w.base, lambda_d=w.lambda_d, lambda_b=w.lambda_b, a=a, b=b)
