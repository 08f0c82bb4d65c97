"""GPTQ: inputs are quantized one after another, and the later inputs compensate for each one's error (`compensation`).

Frantar et al. 2022, arXiv:2210.17323. qwix's version has no order by activation, gives a group that starts inside a
block the grid of the weights before it, and unrolls every input into the program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.quantization.compensation import compensate, damped_hessian, inverse_factor
from lowrank.weights.quantized import uniform
from lowrank.weights.quantized.packing import pack
from lowrank.weights.quantized.schemes import integer
from lowrank.weights.quantized.uniform import Uniform

Grid = tuple[jax.Array, jax.Array]  # scale and zero of each input of a chunk, `[C, out]`
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

    def grid(rows: jax.Array, start: jax.Array) -> Grid:
        if grids is not None:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), grids)
        scale, zero = uniform.scale_and_zero(rows, bits, symmetric)
        zero = _middle(scale, bits) if zero is None else zero
        return jnp.broadcast_to(scale[None], rows.shape), jnp.broadcast_to(zero[None], rows.shape)

    def begin(rows: jax.Array, reach: jax.Array, start: jax.Array) -> tuple[Grid, Grid]:
        del reach
        scale, zero = grid(rows, start)
        return (scale, zero), (scale[0], zero[0])

    def change(plan: Grid, rows: jax.Array, i: jax.Array) -> tuple[Grid, jax.Array, jax.Array]:
        scale, zero = plan
        inverse = jnp.where(scale[i] > 0, 1 / jnp.where(scale[i] > 0, scale[i], 1), 0)
        code = jnp.clip(jnp.round(rows[i] * inverse) + zero[i], least, 2**bits - 1)
        return plan, (code - zero[i]) * scale[i], code

    codes, (scale, zero) = compensate(w, u, chunk, begin, change)
    return codes.astype(jnp.uint8), scale, zero
