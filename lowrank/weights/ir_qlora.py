"""IR-QLoRA's elastic connection: LoRA past which averages of its inputs flow (Qin et al. 2024, arXiv:2402.05445).

`x' = x A + beta1 * avg(x)`, `y = x W + s * (x' B + beta2 * avg(x'))`: with `g = gcd(in, r)` the average of x over its
`in / g` runs of g, repeated `r / g` times, and alike from r to out (equations 9 and 10). Both are products with a
constant matrix, so this is a LoRA whose factors are `A + beta1 P` and `B + beta2 Q`, and it merges as one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import at_least_float32, dot, form, trainable
from lowrank.weights.lora import LoRA, project_up


@form
class IRLoRA(LoRA):
    """A LoRA with `beta1` and `beta2` `[...]`, which start at 0."""

    beta1: jax.Array = trainable(decay=False)
    beta2: jax.Array = trainable(decay=False)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`(A + beta1 P, B + beta2 Q)`."""
        return tuple(
            at_least_float32(x) + jnp.broadcast_to(pooling_matrix(*x.shape[-2:]), x.shape) * beta[..., None, None]
            for x, beta in ((self.a, self.beta1), (self.b, self.beta2))
        )

    def delta(self) -> jax.Array:
        """The update `[..., in, out]` in float32 or wider."""
        return jnp.matmul(*self.factors(), precision="highest") * self.scale[..., None, None]

    def low_rank(self, x: jax.Array) -> jax.Array:
        """The update times `drop(x)` for `x: [..., in]`."""
        a, b = self.factors()
        return project_up(dot(self._dropped(x), a) * self.scale.astype(x.dtype), b)


def pooling_matrix(n: int, m: int) -> np.ndarray:
    """`[n, m]`: the average over `n / g` runs of `g = gcd(n, m)`, repeated `m / g` times."""
    g = math.gcd(n, m)
    return np.tile(np.eye(g, dtype=np.float32), (n // g, m // g)) * np.float32(g / n)


def attach(lora: LoRA) -> IRLoRA:
    """The IR-QLoRA that starts where `lora` does."""
    zeros = jnp.zeros(lora.shape[:-2], jnp.float32)
    return IRLoRA(**vars(lora), beta1=zeros, beta2=zeros)
