"""Attention on each device's rows, heads and tokens: what the compiler does not divide over a mesh by itself."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from lowrank.kernels.attention import context
from lowrank.kernels.attention.mask import Mask

ROWS, HEADS = ("data", "fsdp"), "tensor"  # the axes of the mesh


def over_mesh(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """`attend(q, k, v, mask)`, each device of the program's mesh computing its own rows, heads and tokens.

    The mesh is that of `jax.sharding.use_abstract_mesh`. Its axes that do not divide the rows, the key heads or the
    chunks of tokens repeat the work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return attend(q, k, v, mask)
    rows, heads = _dividing(ROWS, len(q), mesh), _dividing((HEADS,), k.shape[2], mesh)
    tokens = (context.AXIS,) if divides_tokens(mesh, q.shape[1]) else None
    if tokens:
        slots = jnp.arange(q.shape[1], dtype=jnp.int32)[None] if mask.queries.slots is None else mask.queries.slots
        mask = dataclasses.replace(mask, queries=mask.queries._replace(slots=slots))
        attend = functools.partial(context.attend, attend)
    of_keys = tokens if k.shape[1] == q.shape[1] else None

    def of(places: Any, along: Any) -> Any:
        return places.map(lambda x: P(rows if len(x) == len(q) else None, along))

    whole = jax.tree.map(lambda x: P(), mask)
    of_mask = dataclasses.replace(whole, queries=of(mask.queries, tokens), keys=of(mask.keys, of_keys))
    arrays = P(rows, tokens, heads), *(P(rows, of_keys, heads),) * 2
    return jax.shard_map(attend, in_specs=(*arrays, of_mask), out_specs=arrays[0], check_vma=False)(q, k, v, mask)


def divides_tokens(mesh: AbstractMesh, length: int) -> bool:
    """Whether the mesh's axis `context` divides rows of this length into its chunks."""
    size = 1 if mesh.empty else mesh.shape.get(context.AXIS, 1)
    return size > 1 and length % (2 * size) == 0


def _dividing(axes: tuple[str, ...], size: int, mesh: AbstractMesh) -> tuple[str, ...] | None:
    """Those of the axes that the mesh has, if together they divide `size`; else None."""
    axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
