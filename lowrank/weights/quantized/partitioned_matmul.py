"""A product with codes that are divided over a mesh: each device multiplies by the part it has.

A loop over tiles slices the axis that a mesh has divided, and the partitioner, left alone, would gather it first. Here
the product is one operation to the partitioner. Axes of the mesh that divide the rows of `x` gather codes (never
decoded values); those that divide the inputs or outputs of the kernel stay, and inputs are summed over.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Product = Callable[[jax.Array, Any], jax.Array]


def partition_matmul(product: Product, contracted: int) -> Product:
    """`product(x, w)` of `x` `[..., n]` and a quantised kernel, over whose axis `contracted` (0 or 1) it sums.

    On one device it is `product` itself.
    """
    whole = custom_partitioning(product)
    whole.def_partition(
        functools.partial(_partition, product, contracted), sharding_rule=functools.partial(_rule, contracted)
    )
    return whole


def is_partitioned(codes: jax.Array) -> bool:
    """Whether the mesh that an array is on has axes that may divide it, and not only rows of data."""
    return any(size > 1 for axis, size in jax.typeof(codes).sharding.mesh.shape.items() if axis != "data")


def _rule(contracted: int, mesh: Any, operands: Any, results: Any) -> str:
    """All that propagates: the rows of `x`, and the outputs of the kernel. Its codes have fewer rows than it has."""
    del mesh, results
    x, y = ("i", "o") if contracted == 0 else ("o", "i")
    return ", ".join([f"... {x}", *(f"r{k} o" for k in range(len(operands) - 1))]) + f" -> ... {y}"


def _partition(product: Product, contracted: int, mesh: Mesh, args: Any, result: Any) -> tuple[Any, ...]:
    del result
    x, w = args
    batch = x.sharding.spec[: x.ndim - 1]
    taken = {axis for entry in batch for axis in _axes(entry)}
    axes = [tuple(a for a in _axes(entry) if a not in taken) for entry in w.codes.sharding.spec]
    if w.padded != w.rows or w.padded % (w.row_multiple * math.prod(mesh.shape[a] for a in axes[0])):
        axes[0] = ()  # a part that is no whole number of blocks
    summed, kept = axes[contracted], axes[1 - contracted]

    def local(x: jax.Array, w: Any) -> jax.Array:
        y = product(x, dataclasses.replace(w, rows=min(w.rows, w.padded)))
        return jax.lax.psum(y, summed) if summed else y

    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*(entry or None for entry in spec)))  # noqa: E731
    parts = {
        name: place(axes[0] if per[0] else (), axes[1] if per[1] else ())
        for name, per in w.layout.items()
        if getattr(w, name) is not None
    }
    return mesh, local, place(*batch, kept), (place(*batch, summed), dataclasses.replace(w, **parts))


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
