"""SparseGPT: entries are pruned one input after another, and the later inputs compensate for what is lost.

The entries of a block of inputs with the least `w^2 / U[i, i]^2` are pruned, when the block is reached, or the least of
each group of M inputs and each output (Frantar & Alistarh 2023, arXiv:2301.00774; see `quantization.compensation`). The
authors' code prunes one entry more than asked in each block; here the numbers are exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.compression.masks import check_n_of_m, pruned_count, ranks
from lowrank.quantization.compensation import compensate, damped_hessian, inverse_factor

BLOCK = 128  # inputs whose mask is chosen at once


def prune_sparsegpt(
    kernel: np.ndarray,
    gram: np.ndarray,
    *,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """`(kernel, mask)` `[in, out]`: the kernel in float32 with zeros where the mask is False, the others changed.

    `gram` is `x^T x` of the inputs `[in, in]`; `damping` times the mean of its diagonal is added to the diagonal. With
    a `pattern` (N, M), N of M inputs are kept, and `sparsity` has no part. An input that was always 0 is pruned first.
    Raises UserError for a sparsity outside [0, 1], and a pattern that does not divide the inputs.
    """
    rows, columns = kernel.shape
    if pattern:
        check_n_of_m(rows, *pattern)
        block = pattern[1] * max(1, block // pattern[1])
    block = min(block, rows)
    size = -(-rows // block) * block
    w = np.zeros((size, columns), np.float32)
    w[:rows] = np.where(np.diag(gram)[:, None] > 0, kernel, 0)
    u = jnp.asarray(inverse_factor(damped_hessian(gram, damping, size)), jnp.float32)
    ends = np.minimum(np.arange(block, size + 1, block), rows) * columns
    kept = np.diff([end - pruned_count(end, sparsity) for end in (0, *ends)])
    values, mask = _solve(jnp.asarray(w), u, jnp.asarray(kept), block=block, pattern=pattern, inputs=rows)
    return np.asarray(values)[:rows], np.asarray(mask)[:rows]


@functools.partial(jax.jit, static_argnames=("block", "pattern", "inputs"))
def _solve(
    w: jax.Array, u: jax.Array, kept: jax.Array, *, block: int, pattern: tuple[int, int] | None, inputs: int
) -> tuple[jax.Array, jax.Array]:
    """Values and mask `[in, out]`; `kept` are the entries that each block keeps."""
    diagonal = jnp.diag(u)

    def scores(rows: jax.Array, start: jax.Array) -> jax.Array:
        """Those of some inputs from `start`; padding is below all."""
        of = jax.lax.dynamic_slice_in_dim(diagonal, start, len(rows))[:, None]
        real = (start + jnp.arange(len(rows)) < inputs)[:, None]
        return jnp.where(real, jnp.square(rows / of), -1.0)

    def begin(rows: jax.Array, reach: jax.Array, start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
        del reach
        if pattern:
            return (start, jnp.zeros((pattern[1], rows.shape[1]), bool)), ()
        flat = scores(rows, start).reshape(-1)
        return (start, (ranks(flat) < kept[start // block]).reshape(rows.shape)), ()

    def change(plan: tuple[jax.Array, jax.Array], rows: jax.Array, i: jax.Array):
        start, mask = plan
        if pattern:
            n, m = pattern
            first = i // m * m
            group = scores(jax.lax.dynamic_slice_in_dim(rows, first, m), start + first)
            mask = jnp.where(i == first, ranks(group) < n, mask)
        here = mask[i % len(mask)]
        row = jnp.where(here, rows[i], 0)
        return (start, mask), row, (row, here)

    return compensate(w, u, block, begin, change)[0]
