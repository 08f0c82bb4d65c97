"""GPTQ: inputs are quantized one after another, and the later inputs compensate for each one's error.

With `H = X^T X` and `U` upper triangular, `U^T U = H^-1`: input i becomes codes, and its error over `U[i, i]`, times
`U[i, j]`, is taken from every input j > i (Frantar et al. 2022, arXiv:2210.17323, section 3.3). qwix's version has no
order by activation, gives a group that starts inside a block the grid of the weights before it, and unrolls every input
into the program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lowrank.weights.quantized import uniform
from lowrank.weights.quantized.packing import pack
from lowrank.weights.quantized.schemes import integer
from lowrank.weights.quantized.uniform import Uniform

CHUNK = 128  # inputs whose errors are applied to the later ones at once, where there are no groups


def quantize_gptq(
    kernel: np.ndarray,
    gram: np.ndarray,
    mean: np.ndarray,
    *,
    bits: int,
    block: int,
    symmetric: bool,
    act_order: bool,
    damping: float,
) -> Uniform:
    """The codes of a kernel `[in, out]` whose inputs have `x^T x = gram` `[in, in]`.

    `damping` times the mean of the diagonal of `H` is added to the diagonal. A group's grid fits its weights when the
    group is reached; with `act_order` the inputs with the largest `H[i, i]` come first, and grids fit the kernel. An
    input that was always 0 is rounded, and changes no other.
    """
    del mean
    form, chunk = integer(bits, block, symmetric)(jnp.asarray(kernel)), block or CHUNK
    size = -(-form.padded_rows // chunk) * chunk
    w = np.pad(np.float32(kernel), ((0, size - len(kernel)), (0, 0)))
    hessian = damped_hessian(gram, damping, size)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(size)
    u = jnp.asarray(inverse_factor(hessian[np.ix_(order, order)]), jnp.float32)
    grids = _by_input(form, order) if act_order or not block else None
    codes, scale, zero = _solve(jnp.asarray(w[order]), u, grids, bits=bits, chunk=chunk, symmetric=symmetric)
    codes = np.asarray(codes)[np.argsort(order)][: form.padded_rows].reshape(-1, form.block, w.shape[1])
    form = dataclasses.replace(form, codes=pack(jnp.asarray(codes), bits))
    return form if grids else dataclasses.replace(form, scale=scale, zero=None if symmetric else zero)


def damped_hessian(gram: np.ndarray, damping: float, size: int) -> np.ndarray:
    """`H` in float64, `[size, size]`; an input that was always 0, or that is padding, is independent of the others."""
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


def _by_input(form: Uniform, order: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Scale and zero of each input, `[in, out]`, in the given order; the padding of the last group has its grid."""
    groups = jnp.asarray(np.minimum(order // form.block, len(form.scale) - 1))
    zero = _middle(form.scale, form.bits) if form.zero is None else form.zero
    return form.scale[groups], zero[groups]


def _middle(scale: jax.Array, bits: int) -> jax.Array:
    return jnp.full_like(scale, 2 ** (bits - 1))


@functools.partial(jax.jit, static_argnames=("bits", "chunk", "symmetric"))
def _solve(
    w: jax.Array, u: jax.Array, grids: tuple[jax.Array, jax.Array] | None, *, bits: int, chunk: int, symmetric: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes uint8 `[in, out]`, and the grid `[in / chunk, out]` of each chunk's first input."""
    least = 1 if symmetric else 0

    def grid(rows: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        if grids is not None:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), grids)
        scale, zero = uniform.scale_and_zero(rows, bits, symmetric)
        zero = _middle(scale, bits) if zero is None else zero
        return tuple(jnp.broadcast_to(x[None], rows.shape) for x in (scale, zero))

    def solve_chunk(w: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        start = k * chunk
        rows, reach = (jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in (w, u))
        scale, zero = grid(rows, start)
        here = jax.lax.dynamic_slice_in_dim(reach, start, chunk, 1)
        codes, errors = _within(rows, here, scale, zero, least, 2**bits - 1)
        later = jnp.where(jnp.arange(len(w))[None] >= start + chunk, reach, 0)
        return w - jnp.matmul(later.T, errors, precision="highest"), (codes, scale[0], zero[0])

    _, (codes, scale, zero) = jax.lax.scan(solve_chunk, w, jnp.arange(len(w) // chunk))
    return codes.reshape(w.shape).astype(jnp.uint8), scale, zero


def _within(
    rows: jax.Array, u: jax.Array, scale: jax.Array, zero: jax.Array, least: int, most: int
) -> tuple[jax.Array, jax.Array]:
    """Codes, and errors over `U[i, i]`, both `[chunk, out]`, of the inputs of one chunk."""

    def step(rows: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        inverse = jnp.where(scale[i] > 0, 1 / jnp.where(scale[i] > 0, scale[i], 1), 0)
        code = jnp.clip(jnp.round(rows[i] * inverse) + zero[i], least, most)
        error = (rows[i] - (code - zero[i]) * scale[i]) / u[i, i]
        return rows - u[i][:, None] * error[None], (code, error)

    return jax.lax.scan(step, rows, jnp.arange(len(rows)))[1]
