"""A product with codes that are sharded over a mesh: each device multiplies by its own shard.

A loop over tiles slices the sharded axis, and XLA's partitioner would gather that axis first. Here the whole product is
one operation for the partitioner. Over mesh axes that shard the rows of `x`, the codes are gathered, not the
dequantized values. Over mesh axes that shard the kernel's inputs or outputs, the codes stay sharded, and the products
with shards of the inputs are summed over devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Product = Callable[[jax.Array, Any], jax.Array]


def partition_matmul(product: Product, contracted: int) -> Product:
    """`product(x, w)` as one operation for the partitioner; on one device it is `product` itself.

    `x` is `[..., n]`, `w` is a quantized kernel, and the product sums over the kernel's axis `contracted` (0 or 1).
    """
    partitioned = custom_partitioning(product)
    partitioned.def_partition(
        functools.partial(_partition, product, contracted), sharding_rule=functools.partial(_rule, contracted)
    )
    return partitioned


def axes_to_gather(x: jax.Array, w: Any) -> frozenset[str]:
    """The axes of a TPU mesh over which the codes of `w` are gathered before they are multiplied with `x`.

    These are all axes but `tensor`, which shards the product too. Left to itself, the TPU's compiler moves dequantized
    shards, of four times the bytes of codes in four bits. Where `x` has fewer values than there are codes, as in
    decoding, it decides what moves.
    """
    mesh = jax.typeof(w.codes).sharding.mesh
    on_tpu = mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"
    if not on_tpu or x.size < w.codes.size or AxisType.Manual in mesh.axis_types:
        return frozenset()
    return frozenset(axis for axis, size in mesh.shape.items() if size > 1 and axis != "tensor")


def gather_codes(w: Any, axes: frozenset[str]) -> Any:
    """The quantized kernel `w` whose arrays no axis in `axes` shards; the compiler decides on the other axes."""
    if not axes:
        return w
    whole = PartitionSpec()
    on = {"mesh": jax.typeof(w.codes).sharding.mesh, "axis_names": axes}
    return jax.shard_map(lambda w: w, in_specs=whole, out_specs=whole, check_vma=False, **on)(w)


def is_partitioned(codes: jax.Array, gathered: frozenset[str]) -> bool:
    """Whether the array's mesh has an axis of more than one device besides those in `gathered`.

    The axis `data` does not count, since it does not shard weights.
    """
    shape = jax.typeof(codes).sharding.mesh.shape
    return any(size > 1 for axis, size in shape.items() if axis != "data" and axis not in gathered)


def _rule(contracted: int, mesh: Any, operands: Any, results: Any) -> str:
    """The sharding rule, by which the rows of `x` and the kernel's outputs propagate; its codes have fewer rows."""
    del mesh, results
    x, y = ("i", "o") if contracted == 0 else ("o", "i")
    return ", ".join([f"... {x}", *(f"r{k} o" for k in range(len(operands) - 1))]) + f" -> ... {y}"


def _partition(product: Product, contracted: int, mesh: Mesh, args: Any, result: Any) -> tuple[Any, ...]:
    """`(mesh, product of shards, result sharding, argument shardings)`, as `def_partition` asks for."""
    del result
    x, w = args
    batch = x.sharding.spec[: x.ndim - 1]
    taken = {axis for entry in batch for axis in _axes(entry)}
    axes = [tuple(a for a in _axes(entry) if a not in taken) for entry in w.codes.sharding.spec]
    if w.padded_rows != w.rows or w.padded_rows % (w.row_multiple * math.prod(mesh.shape[a] for a in axes[0])):
        axes[0] = ()  # a shard would not be a whole number of blocks
    summed, output_axes = axes[contracted], axes[1 - contracted]

    def local(x: jax.Array, w: Any) -> jax.Array:
        y = product(x, dataclasses.replace(w, rows=min(w.rows, w.padded_rows)))
        return jax.lax.psum(y, summed) if summed else y

    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*(entry or None for entry in spec)))  # noqa: E731
    shards = {
        name: place(axes[0] if per[0] else (), axes[1] if per[1] else ())
        for name, per in w.layout.items()
        if getattr(w, name) is not None
    }
    return mesh, local, place(*batch, output_axes), (place(*batch, summed), dataclasses.replace(w, **shards))


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
