"""Attention on each device's rows and heads, for kernels that the compiler does not partition over a mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from lowrank.kernels.attention.mask import Mask

ROWS, HEADS = ("data", "fsdp"), "tensor"  # the axes of the mesh


def over_mesh(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """`attend(q, k, v, mask)`, each device of the program's mesh computing its own rows and heads.

    The mesh is that of `jax.sharding.use_abstract_mesh`. Its axes that do not divide the rows or the key heads repeat
    the work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return attend(q, k, v, mask)
    rows = tuple(axis for axis in ROWS if axis in mesh.shape)
    rows = rows if len(q) % math.prod(mesh.shape[axis] for axis in rows) == 0 else ()
    heads = HEADS if HEADS in mesh.shape and k.shape[2] % mesh.shape[HEADS] == 0 else None
    arrays = P(rows or None, None, heads)

    def of_mask(x: Any) -> P:
        return P(rows or None) if x.ndim and len(x) == len(q) else P()

    specs = (arrays, arrays, arrays, jax.tree.map(of_mask, mask))
    return jax.shard_map(attend, in_specs=specs, out_specs=arrays, check_vma=False)(q, k, v, mask)
