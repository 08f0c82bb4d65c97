"""AWQ: each input is scaled before it is quantized, by a power of its mean magnitude.

`s = m^a`, with m the input's mean magnitude and a the value of a grid over [0, 1] that minimizes the error
`|| X (W - Q(s W) / s) ||` (Lin et al. 2023, arXiv:2306.00978, equations 4 and 5). qwix leaves the correlation of inputs
out of this error; here it is exact, from `X^T X`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.weights.quantized.input_scaled import InputScaled, scale_inputs
from lowrank.weights.quantized.schemes import integer

LEAST = 1e-4  # smaller magnitudes, relative to the largest input's, are raised to this one


def quantize_awq(
    kernel: np.ndarray, gram: np.ndarray, mean: np.ndarray, *, bits: int, block: int, symmetric: bool, grid: int
) -> InputScaled:
    """The codes of a kernel `[in, out]` whose inputs have `x^T x = gram` `[in, in]`, and `mean` of `|x|` `[in]`.

    `grid` is the number of exponents that are tried, from 0, which is plain rounding, to 1.
    """
    w = jnp.asarray(kernel)
    scales = candidate_scales(jnp.asarray(mean, jnp.float32), grid)
    size = max(np.trace(gram), np.finfo(np.float32).tiny)
    losses = _losses(w, jnp.asarray(gram / size, jnp.float32), scales, bits, block, symmetric)
    return scale_inputs(w, scales[jnp.argmin(losses)], integer(bits, block, symmetric))


def candidate_scales(mean: jax.Array, grid: int) -> jax.Array:
    """The scales `[grid, in]` of each exponent; the geometric mean of the largest and the smallest of a row is 1."""
    top = jnp.max(mean)
    size = jnp.where(top > 0, jnp.maximum(mean / jnp.where(top > 0, top, 1), LEAST), 1)
    powers = size[None] ** jnp.linspace(0.0, 1.0, grid)[:, None]
    return powers / jnp.sqrt(jnp.max(powers, axis=1) * jnp.min(powers, axis=1))[:, None]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _losses(w: jax.Array, gram: jax.Array, scales: jax.Array, bits: int, block: int, symmetric: bool) -> jax.Array:
    """`|| X (W - W') ||^2` for each row of `scales`, in units of `|| X ||^2`."""

    def loss(scale: jax.Array) -> jax.Array:
        form = scale_inputs(w.astype(jnp.float32), scale, integer(bits, block, symmetric))
        error = form.materialize() - w.astype(jnp.float32)
        return jnp.sum(error * jnp.matmul(gram, error, precision="highest"))

    return jax.lax.map(loss, scales)
