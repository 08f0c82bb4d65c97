"""Where activations lie on a mesh: their rows apart, as those of the batch are.

Without being told, the compiler may let the residual stream follow the embedding, whose width `fsdp` divides: every
device then computes with all rows, on its part of each kernel, and the activations travel instead of the kernels.
"""

import math

import jax
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp")  # of the mesh, over which rows are divided


def apart(x: jax.Array) -> jax.Array:
    """`x` `[B, ...]` with its rows divided over the mesh that the program is traced for, if that divides them.

    The compiler decides on the other dimensions. The mesh is the one `jax.sharding.use_abstract_mesh` tells.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in AXES if not mesh.empty and mesh.shape.get(axis, 1) > 1)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)))
