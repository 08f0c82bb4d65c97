"""AWQ: inputs are scaled before they are quantised, those the more that are larger.

`s = m^a`, with m each input's mean magnitude and a the one of a grid over [0, 1] for which `|| X (W - Q(s W) / s) ||`
is least (Lin et al. 2023, arXiv:2306.00978, equations 4 and 5). Ours and not qwix's, which leaves the correlation of
inputs out of that error: it is exact, from `X^T X`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.weights.quantized.input_scaled import InputScaled, scale_inputs
from lowrank.weights.quantized.schemes import integer

LEAST = 1e-4  # of the largest input's magnitude: no input is scaled as if it were smaller


def quantize(
    kernel: np.ndarray, gram: np.ndarray, mean: np.ndarray, *, bits: int, block: int, symmetric: bool, grid: int
) -> InputScaled:
    """The codes of a kernel `[in, out]` whose inputs have `x^T x = gram` `[in, in]`, and `mean` of `|x|` `[in]`.

    `grid`: how many exponents are tried, from 0, which is rounding alone, to 1.
    """
    w = jnp.asarray(kernel)
    scales = scales_of(jnp.asarray(mean, jnp.float32), grid)
    size = max(np.trace(gram), np.finfo(np.float32).tiny)
    losses = _losses(w, jnp.asarray(gram / size, jnp.float32), scales, bits, block, symmetric)
    return scale_inputs(w, scales[jnp.argmin(losses)], integer(bits, block, symmetric))


def scales_of(mean: jax.Array, grid: int) -> jax.Array:
    """`[grid, in]`, of each exponent; the geometric mean of its largest and its least is 1."""
    top = jnp.max(mean)
    size = jnp.where(top > 0, jnp.maximum(mean / jnp.where(top > 0, top, 1), LEAST), 1)
    powers = size[None] ** jnp.linspace(0.0, 1.0, grid)[:, None]
    return powers / jnp.sqrt(jnp.max(powers, axis=1) * jnp.min(powers, axis=1))[:, None]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _losses(w: jax.Array, gram: jax.Array, scales: jax.Array, bits: int, block: int, symmetric: bool) -> jax.Array:
    """`|| X (W - W') ||^2` for each row of `scales`, in units of `|| X ||^2`."""

    def loss(scale: jax.Array) -> jax.Array:
        made = scale_inputs(w.astype(jnp.float32), scale, integer(bits, block, symmetric))
        off = made.materialize() - w.astype(jnp.float32)
        return jnp.sum(off * jnp.matmul(gram, off, precision="highest"))

    return jax.lax.map(loss, scales)
