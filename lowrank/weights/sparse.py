"""Sparse fine-tuning: `W` plus learned values at a few chosen places.

Only the k values per kernel have a gradient, optimizer moments and a place in an adapter; full fine-tuning has in x out
of each. The product itself is dense, so the gradient of one layer's whole kernel exists as a temporary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.weight import KERNEL, Weight, at_least_float32, form, frozen, materialize, trainable


@form
class Sparse(Weight):
    """`base` `[..., in, out]` with `values` `[..., k]` added at the `indices` `[..., k]`.

    An index of `in * out` marks a free slot: its value has no place and no gradient.
    """

    base: Any = frozen(axes=KERNEL)
    indices: jax.Array = frozen()  # int32, row-major and ascending; distinct except for free slots
    values: jax.Array = trainable(change=True)

    def materialize(self) -> jax.Array:
        """The kernel with the values added, summed in float32 and rounded once to the base's dtype."""
        base = materialize(self.base)
        flat = base.reshape(*base.shape[:-2], -1)
        moved = at_least_float32(jnp.take_along_axis(flat, self.indices, axis=-1)) + self.values
        flat = jnp.put_along_axis(flat, self.indices, moved.astype(flat.dtype), axis=-1, inplace=False)
        return flat.reshape(base.shape)


def attach(w: Any, indices: jax.Array) -> Sparse:
    """A Sparse on `w` `[..., in, out]` with zeros at `indices` `[..., k]`."""
    return Sparse(base=w, indices=indices, values=jnp.zeros(indices.shape, jnp.float32))


def count_places(w: Any, density: float) -> int:
    """The number of places, at least one, that are the share `density` of a kernel's in x out places.

    Raises UserError for a kernel whose places int32 cannot count.
    """
    size = w.shape[-2] * w.shape[-1]
    if size >= 2**31:
        raise UserError(
            f"a kernel of {w.shape[-2]} x {w.shape[-1]} has more places than the 2^31 that int32 can index: leave it "
            "out of method.target"
        )
    return max(1, round(density * size))


@functools.partial(jax.jit, static_argnames="count")
def top_indices(scores: jax.Array, count: int) -> jax.Array:
    """The indices int32 `[..., count]`, ascending, of the largest scores `[..., in, out]` of each layer."""
    return jnp.sort(top_scores(scores, count)[1], axis=-1)


@functools.partial(jax.jit, static_argnames="count")
def top_scores(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest scores `[..., count]` of each layer of `[..., in, out]`, falling, and their indices, in int32.

    The layers of a stack are sorted one after another, to bound the memory.
    """
    flat = scores.reshape(-1, scores.shape[-2] * scores.shape[-1])
    top, chosen = jax.lax.map(lambda row: jax.lax.top_k(row, count), flat)
    shape = (*scores.shape[:-2], count)
    return top.reshape(shape), chosen.astype(jnp.int32).reshape(shape)


@functools.partial(jax.jit, static_argnames="total")
def largest_mask(scores: Sequence[jax.Array], total: int) -> list[jax.Array]:
    """Bools: whether an entry is among the `total` largest of all arrays; of equal ones, the first ones are."""
    flat = jnp.concatenate([x.reshape(-1) for x in scores])
    edge = jnp.sort(flat)[flat.size - total]
    above, equal = flat > edge, flat == edge
    chosen = above | (equal & (jnp.cumsum(equal) <= total - jnp.sum(above)))
    ends = np.cumsum([x.size for x in scores])[:-1]
    return [part.reshape(x.shape) for part, x in zip(jnp.split(chosen, ends), scores, strict=True)]
