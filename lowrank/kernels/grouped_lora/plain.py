"""The grouped low-rank product in plain JAX: one product with all adapters, or products of sorted rows."""

import jax
import jax.numpy as jnp

from lowrank.kernels.grouped_matmul.dispatch import ragged_dot

# With up to this number of ranks in all, a product with every adapter is taken, which needs no sorted copy of the rows.
# By arithmetic, not measured: at 512 ranks it takes a quarter of the product with a 4096 x 4096 base.
MASKED_RANKS = 512
MASKED_ROWS = 512


def multiply(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array) -> jax.Array:
    """`scale[id] * (x @ a[id].T) @ b[id]` of each row, by the form that is cheaper for so many ranks."""
    few = a.shape[0] * a.shape[1] <= MASKED_RANKS
    return (multiply_masked if few else multiply_sorted)(x, a, b, scale, ids)


def multiply_on_tpu(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array) -> jax.Array:
    """`multiply` for a TPU, which reads the adapters for longer than it multiplies few rows by all of them."""
    return (multiply_masked if len(x) <= MASKED_ROWS else multiply)(x, a, b, scale, ids)


def multiply_masked(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array) -> jax.Array:
    """The product with the ranks of all adapters, of which each row keeps its own.

    A rank of `b` that holds a value that is not finite is left out, as zero times it would reach every row. The rows of
    its adapter are NaN.
    """
    owner = jnp.repeat(jnp.arange(len(a)), a.shape[1])
    flat_a, flat_b = (w.reshape(-1, w.shape[-1]).astype(x.dtype) for w in (a, b))
    own = ids[:, None] == owner[None, :]
    s = jax.lax.dot_general(x, flat_a, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    s = jnp.where(own, s * jnp.broadcast_to(scale[owner], s.shape), 0).astype(x.dtype)
    finite = jnp.all(jnp.isfinite(flat_b), axis=1)
    y = jnp.matmul(s, jnp.where(finite[:, None], flat_b, 0), preferred_element_type=jnp.float32)
    broken = jnp.any(own & ~finite[None, :], axis=1)
    return jnp.where(broken[:, None], jnp.nan, y).astype(x.dtype)


def multiply_sorted(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, ids: jax.Array) -> jax.Array:
    """The products of the rows of each adapter, which are brought together first."""
    keys = sort_keys(ids, len(a))
    order = jnp.argsort(keys, stable=True)
    sizes = group_sizes(ids, len(a))
    s = ragged_dot(x[order], a.swapaxes(1, 2).astype(x.dtype), sizes)
    rows_scale = jnp.append(scale, 0)[keys[order]].astype(jnp.float32)
    y = ragged_dot((s * rows_scale[:, None]).astype(x.dtype), b.astype(x.dtype), sizes)
    return y[jnp.argsort(order)]


def sort_keys(ids: jax.Array, adapters: int) -> jax.Array:
    """The ids `[T]`, and the number of adapters for a row that has none."""
    return jnp.where((ids >= 0) & (ids < adapters), ids, adapters)


def group_sizes(ids: jax.Array, adapters: int) -> jax.Array:
    """`[N]`: the number of rows of each adapter."""
    return jnp.sum(ids[:, None] == jnp.arange(adapters)[None, :], axis=0, dtype=jnp.int32)
