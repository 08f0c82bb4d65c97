"""The mesh, and the shardings of parameters by ordered rules `(regex, PartitionSpec)` for leaf names.

A spec applies to a leaf's last dimensions, so one rule serves a kernel `[in, out]` and a stack `[layers, in, out]`.
The rules name the leaves of models; the arrays that a form adds to its kernel declare their own axes.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank.core import tree, weight
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

_SUBLAYER = r"(layers|top)/(attn|mlp|mlp/experts|mlp/shared)"
# The names of plain leaves and of weights. The arrays inside a form follow the axes that its fields declare.
DEFAULT_RULES: Rules = (
    (r"(.*/)?(bias|scale)", P()),
    (rf"{_SUBLAYER}/(q|k|v|qkv|gate|up)/kernel", P("fsdp", "tensor")),  # sharded over its outputs
    (rf"{_SUBLAYER}/(o|down)/kernel", P("tensor", "fsdp")),  # sharded over its inputs, the outputs above
    (r"(layers|top)/mlp/(router|shared_gate|routed/router)/kernel", P()),
    (r"(layers|top)/mlp/routed/down/kernel", P("fsdp", None)),
    (r"(layers|top)/mlp/routed/up/kernel", P(None, "fsdp")),
    (r"(layers|top)/(attn|mlp)_adapter/down/kernel", P("fsdp", None)),
    (r"(layers|top)/(attn|mlp)_adapter/up/kernel", P(None, "fsdp")),
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"embed/(positions|types)", P(None, "fsdp")),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"(pooler|head/dense|head/out)/kernel", P()),
    (r"prompt/embedding|prefix/(k|v)|shared/.*", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of this run's devices with axes `data, fsdp, tensor`; one size may be -1, which takes all other devices.

    In one process, a mesh smaller than the number of devices takes the first of them. Raises UserError if the sizes do
    not fit the devices.
    """
    return make_mesh_of_devices(jax.devices(), data, fsdp, tensor)


def make_mesh_of_devices(devices: Sequence[Any], data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the given devices with axes `data, fsdp, tensor`; one size may be -1, which takes all other devices.

    The devices may belong to another machine, if programs are compiled for them only. Raises UserError if the sizes do
    not fit the devices.
    """
    sizes = [data, fsdp, tensor]
    axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"the mesh {axes} is not valid: its sizes must be positive, except that one may be -1")
    rest = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // rest if size == -1 else size for size in sizes]
    total = math.prod(sizes)
    needs_all = -1 in (data, fsdp, tensor) or jax.process_count() > 1
    if not 0 < total <= len(devices) or (needs_all and total != len(devices)):
        raise UserError(
            f"the mesh {axes} does not fit {plural(len(devices), 'device')}: the product of its sizes must be their "
            "number"
        )
    # With Auto the compiler places the collectives; the default of jax.make_mesh is explicit axes.
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:total])


def parameter_shardings(params: PyTree, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> PyTree:
    """A NamedSharding for each leaf (array or shape), by the first rule that matches the name of its weight.

    A field of a form is sharded along the axes that it declares (`weight.trainable`), as the kernel's rule shards the
    kernel's inputs and outputs. A field that runs along one of these only, such as a low-rank factor, is sharded over
    `fsdp` too if the kernel is. Each device then holds its part of the adapter and of the moments, and the factors of a
    layer are gathered when it is computed, as the kernel is.

    A dimension that its mesh axes do not divide is replicated over the last of them. A leaf with fewer dimensions than
    its spec is replicated. Raises UserError for a leaf that no rule matches.
    """

    def place(name: str, w: Any) -> Any:
        spec = tree.first_match(rules, name)
        if not weight.is_weight(w):
            return _fit(spec, w, mesh)
        return weight.map_fields(lambda field, x: _fit(_field_spec(field.metadata["axes"], spec), x, mesh), w)

    return tree.map_named(place, params, is_leaf=weight.is_weight)


def _field_spec(axes: weight.Axes, kernel: PartitionSpec) -> PartitionSpec:
    """The spec of a form's field whose last dimensions run along `axes`, where the kernel's own is `kernel`."""
    along = dict(zip(weight.KERNEL, (None, None, *kernel)[-2:], strict=True)) | {None: None}
    spec = [_names(along[axis]) for axis in axes]
    if "fsdp" in _names(tuple(kernel)) and not any("fsdp" in names for names in spec):
        spec = [(*names, "fsdp") if axis else names for names, axis in zip(spec, axes, strict=True)]
    return P(*(names or None for names in spec))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a spec, or in several of them."""
    if entry is None or isinstance(entry, str):
        return (entry,) if entry else ()
    return tuple(name for part in entry for name in _names(part))


def _fit(spec: PartitionSpec, leaf: Any, mesh: Mesh) -> NamedSharding:
    missing = leaf.ndim - len(spec)
    if missing < 0:
        return NamedSharding(mesh, P())
    aligned = zip((None,) * missing + tuple(spec), leaf.shape, strict=True)
    return NamedSharding(mesh, P(*(_dividing(_names(entry), size, mesh) for entry, size in aligned)))


def _dividing(axes: tuple[str, ...], size: int, mesh: Mesh) -> Any:
    """The most mesh axes, from the first on, whose product divides a dimension of this size; None if none do."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes[0] if len(axes) == 1 else axes or None


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that is replicated on every device."""
    return NamedSharding(mesh, P())


def mesh_context(arrays: PyTree) -> contextlib.AbstractContextManager:
    """A context in which programs are traced for the mesh of `arrays`, if they have one."""
    placed = (getattr(x, "sharding", None) for x in jax.tree.leaves(arrays))
    mesh = next((s.mesh.abstract_mesh for s in placed if isinstance(s, NamedSharding)), None)
    return jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext()


def optimizer_shardings(optimizer: Any, state: PyTree, trained: PyTree, mesh: Mesh) -> PyTree:
    """The shardings of an optimizer state (shapes).

    An array of its parameter's shape has its parameter's sharding, and the others are replicated.
    """

    def masked(leaf: Any) -> bool:  # stands for a parameter of another label group
        return isinstance(leaf, optax.MaskedNode)

    def follow(leaf: Any, param: Any) -> Any:
        return leaf if masked(leaf) else param.sharding if leaf.shape == param.shape else replicated_sharding(mesh)

    return optax.tree.map_params(
        optimizer, follow, state, trained, transform_non_params=lambda _: replicated_sharding(mesh), is_leaf=masked
    )


def num_batch_shards(mesh: Mesh) -> int:
    """The number of shards of a batch's rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError if a global batch does not divide into microbatches over the mesh, or over the hosts."""
    shards = num_batch_shards(mesh)
    if size % (shards * accumulate):
        raise UserError(
            f"data.batch_size {size} is not divisible by {shards * accumulate}, the product of mesh.data "
            f"{mesh.shape['data']}, mesh.fsdp {mesh.shape['fsdp']} and optim.accumulate {accumulate}: use a multiple"
        )
    local = NamedSharding(mesh, BATCH).addressable_devices_indices_map((size,)).values()
    rows = {i for index in local if index for i in range(*index[0].indices(size))}
    if len(rows) * len({device.process_index for device in mesh.devices.flat}) != size:
        raise UserError(
            f"mesh.tensor {mesh.shape['tensor']} spans several hosts, each of which loads its own rows of the batch: "
            "choose a size that divides the devices of one host"
        )


def make_global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, sharded over `data` and `fsdp`, of which `batch` holds this host's rows."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def shard_batch_axis(x: jax.Array) -> jax.Array:
    """`x` `[B, ...]` with its rows sharded over the mesh of the program, if its `data` and `fsdp` axes divide them.

    The mesh is that of `jax.sharding.use_abstract_mesh`. The compiler decides on the other dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ("data", "fsdp") if not mesh.empty and mesh.shape.get(axis, 1) > 1)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)))
