"""Inputs of a kernel are changed one after another, and the later ones make up for each one's error.

With `H = X^T X` and `U` upper triangular, `U^T U = H^-1`: input i is changed, and its error over `U[i, i]`, times
`U[i, j]`, is taken from every input j > i (Frantar et al. 2022, arXiv:2210.17323, section 3.3). Within a chunk of
inputs that happens at once; the inputs after it change when the chunk is done. Shapes: a chunk of C inputs.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lowrank.core.typing import PyTree


class Begin(Protocol):
    """What the inputs of a chunk have in common."""

    def __call__(self, rows: jax.Array, reach: jax.Array, start: jax.Array) -> tuple[PyTree, PyTree]:
        """`(plan, what is returned of it)` for the inputs `[C, out]` from `start`, with their part of U `[C, C]`."""


class Change(Protocol):
    """What an input becomes."""

    def __call__(self, plan: PyTree, rows: jax.Array, i: jax.Array) -> tuple[PyTree, jax.Array, PyTree]:
        """`(plan, the new row [out], what is returned of it)` of input `i` of the chunk `rows` `[C, out]` as it is."""


def compensate(w: jax.Array, u: jax.Array, chunk: int, begin: Begin, change: Change) -> tuple[PyTree, PyTree]:
    """What `change` returns of each input, `[in, ...]`, and `begin` of each chunk, `[in / chunk, ...]`.

    `w` is `[in, out]` with inputs in the order in which they change; `chunk` divides their number.
    """

    def solve_chunk(w: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        start = k * chunk
        rows, reach = (jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in (w, u))
        here = jax.lax.dynamic_slice_in_dim(reach, start, chunk, 1)
        plan, of_chunk = begin(rows, here, start)
        errors, of_inputs = _within(plan, rows, here, change)
        later = jnp.where(jnp.arange(len(w))[None] >= start + chunk, reach, 0)
        return w - jnp.matmul(later.T, errors, precision="highest"), (of_inputs, of_chunk)

    _, (of_inputs, of_chunks) = jax.lax.scan(solve_chunk, w, jnp.arange(len(w) // chunk))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_inputs), of_chunks


def _within(plan: PyTree, rows: jax.Array, u: jax.Array, change: Change) -> tuple[jax.Array, PyTree]:
    """Errors over `U[i, i]` `[C, out]`, and what `change` returns, of the inputs of one chunk."""

    def step(carry: tuple[PyTree, jax.Array], i: jax.Array) -> tuple[Any, tuple[jax.Array, PyTree]]:
        plan, rows = carry
        plan, row, found = change(plan, rows, i)
        error = (rows[i] - row) / u[i, i]
        return (plan, rows - u[i][:, None] * error[None]), (error, found)

    return jax.lax.scan(step, (plan, rows), jnp.arange(len(rows)))[1]


def damped_hessian(gram: np.ndarray, damping: float, size: int) -> np.ndarray:
    """`H` in float64, `[size, size]`; an input that was always 0, or that is padding, is independent of the others.

    `damping` times the mean of the diagonal is added to it.
    """
    n = len(gram)
    hessian = np.eye(size)
    hessian[:n, :n] = gram
    diagonal = np.diag(hessian)
    damped = np.where(diagonal > 0, diagonal + damping * np.mean(np.diag(gram)), 1.0)
    np.fill_diagonal(hessian, damped)
    return hessian


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """`U`, upper triangular, of `U^T U = H^-1`: the inverse of the upper triangular `R` of `H = R R^T`."""
    r = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return scipy.linalg.solve_triangular(r, np.eye(len(r)), lower=False)
