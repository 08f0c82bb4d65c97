"""IR-QLoRA's elastic connection: a LoRA plus averages of its factors' inputs (Qin et al. 2024, arXiv:2402.05445).

`x' = x A + beta1 * avg(x)` and `y = x W + s * (x' B + beta2 * avg(x'))`. With `g = gcd(in, r)`, `avg(x)` is the average
over the `in / g` runs of g entries of x, repeated `r / g` times; `avg(x')` does the same from r to out (equations 9 and
10). Both averages are products with a constant matrix P or Q. So this is a LoRA with the factors `A + beta1 P` and
`B + beta2 Q`, and it merges as a LoRA does.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.weight import at_least_float32, dot_to_float32, form, name_product, trainable
from lowrank.weights.lora import LoRA, project_up


@form
class IRLoRA(LoRA):
    """A LoRA with `beta1` and `beta2` `[...]`, which start at 0."""

    beta1: jax.Array = trainable(decay=False)
    beta2: jax.Array = trainable(decay=False)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`(A + beta1 P, B + beta2 Q)`."""
        a, b = (
            at_least_float32(x) + jnp.broadcast_to(pooling_matrix(*x.shape[-2:]), x.shape) * beta[..., None, None]
            for x, beta in ((self.a, self.beta1), (self.b, self.beta2))
        )
        return a, b

    def delta(self) -> jax.Array:
        """The update `[..., in, out]` in float32 or wider."""
        return jnp.matmul(*self.factors(), precision="highest") * self.scale[..., None, None]

    def low_rank_update(self, x: jax.Array) -> jax.Array:
        """`drop(x)` `[..., in]` times the update."""
        a, b = self.factors()
        t = dot_to_float32(self._drop(x), a) * self.scale
        return project_up(name_product(t.astype(x.dtype)), b)


def pooling_matrix(n: int, m: int) -> np.ndarray:
    """The matrix `[n, m]` that averages `n / g` runs of `g = gcd(n, m)` entries and repeats that `m / g` times."""
    g = math.gcd(n, m)
    return np.tile(np.eye(g, dtype=np.float32), (n // g, m // g)) * np.float32(g / n)


def attach(lora: LoRA) -> IRLoRA:
    """The IR-QLoRA with the factors of `lora`, which starts as the same kernel: both betas are 0."""
    zeros = jnp.zeros(lora.shape[:-2], jnp.float32)
    return IRLoRA(**vars(lora), beta1=zeros, beta2=zeros)
