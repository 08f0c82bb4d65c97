"""The mesh, and the shardings of parameters by ordered rules `(regex, PartitionSpec)` for leaf names.

A spec applies to a leaf's last dimensions, so one rule serves a kernel `[in, out]` and a stack `[layers, in, out]`.
The rules name the leaves of models; the arrays that a form adds to its kernel declare their own axes.
"""

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lowrank.core import tree, weight
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import PyTree

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "context", "tensor")  # those that communicate most are innermost: their devices are neighbors
ROWS = ("data", "fsdp")  # the axes that shard the rows of a batch; `context` shards the tokens of each row

_SUBLAYER = r"(layers|top)/(attn|mlp|mlp/experts|mlp/shared)"
# The names of plain leaves and of weights. The arrays inside a form follow the axes that its fields declare.
DEFAULT_RULES: Rules = (
    (r"(.*/)?(bias|scale)", P()),
    (rf"{_SUBLAYER}/(q|k|v|qkv|gate|up|gate_up)/kernel", P("fsdp", "tensor")),  # sharded over its outputs
    (rf"{_SUBLAYER}/(o|down)/kernel", P("tensor", "fsdp")),  # sharded over its inputs, the outputs above
    (r"(layers|top)/mlp/(router|shared_gate|routed/router)/kernel", P()),
    (r"(layers|top)/mlp/routed/down/kernel", P("fsdp", None)),
    (r"(layers|top)/mlp/routed/up/kernel", P(None, "fsdp")),
    (r"(layers|top)/(attn|mlp)_adapter/down/kernel", P("fsdp", None)),
    (r"(layers|top)/(attn|mlp)_adapter/up/kernel", P(None, "fsdp")),
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"embed/(positions|types|relative)", P(None, "fsdp")),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"(pooler|head/dense|head/out)/kernel", P()),
    (r"prompt/embedding|prefix/(k|v)|shared/.*", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1, num_slices: int = 1) -> Mesh:
    """A mesh of this run's devices with the axes `AXES`; one size may be -1, which takes all other devices.

    In one process, a mesh smaller than the number of devices takes the first of them. `num_slices` is the number of TPU
    slices, or of other groups of devices with a slower network between them: `data` alone spans several of them.
    Raises UserError if the sizes do not fit the devices.
    """
    return make_mesh_of_devices(jax.devices(), data, fsdp, tensor, context, num_slices)


def make_mesh_of_devices(
    devices: Sequence[Any], data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1, num_slices: int = 1
) -> Mesh:
    """`make_mesh` of the given devices.

    They may belong to another machine, if programs are compiled for them only. Raises UserError if the sizes do not fit
    the devices.
    """
    asked = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    axes = ", ".join(f"{axis}={size}" for axis, size in asked.items())
    sizes = list(asked.values())
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"the mesh {axes} is not valid: its sizes must be positive, except that one may be -1")
    rest = math.prod(size for size in sizes if size != -1)
    total = rest * (len(devices) // rest if -1 in sizes else 1)
    needs_all = -1 in sizes or jax.process_count() > 1 or num_slices > 1
    if not 0 < total <= len(devices) or (needs_all and total != len(devices)):
        raise UserError(
            f"the mesh {axes} does not fit {plural(len(devices), 'device')}: the product of its sizes must be their "
            f"number{_fitting_size(asked, len(devices))}"
        )
    sizes = [total // rest if size == -1 else size for size in sizes]
    groups = _slices(devices[:total], num_slices)
    if sizes[0] % num_slices:
        raise UserError(
            f"mesh.data={sizes[0]} is not divisible by mesh.num_slices={num_slices}, and no other axis may span "
            f"several slices: make mesh.data a multiple of {num_slices}, and the product of the other sizes a divisor "
            f"of the {plural(len(groups[0]), 'device')} of a slice"
        )
    inside = (sizes[0] // num_slices, *sizes[1:])
    # With Auto the compiler places the collectives; the default of jax.make_mesh is explicit axes.
    return Mesh(np.concatenate([_lay_out(group, inside, axes) for group in groups]), AXES, (AxisType.Auto,) * len(AXES))


def _fitting_size(asked: Mapping[str, int], devices: int) -> str:
    """Words that name a size of one axis with which the mesh would take all devices; empty if there is none."""
    for axis in asked:
        rest = math.prod(size for other, size in asked.items() if other != axis and size != -1)
        if devices % rest == 0:
            return f", as with mesh.{axis}={devices // rest}"
    return ""


def _slices(devices: Sequence[Any], num_slices: int) -> list[Sequence[Any]]:
    """The devices of each slice: TPUs know theirs, and other devices are taken in the order of their processes."""
    if num_slices < 1 or len(devices) % num_slices:
        raise UserError(
            f"mesh.num_slices={num_slices} does not divide {plural(len(devices), 'device')}: give the number of slices"
        )
    own = [getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices]
    if len(set(own)) not in (1, num_slices) or (len(set(own)) == 1 < num_slices and devices[0].platform == "tpu"):
        found = plural(len(set(own)), "slice")
        raise UserError(f"mesh.num_slices={num_slices}, but the devices are {found}: set it to {len(set(own))}")
    in_order = [devices[i] for i in sorted(range(len(devices)), key=own.__getitem__)]
    size = len(devices) // num_slices
    return [in_order[i * size : (i + 1) * size] for i in range(num_slices)]


def _lay_out(devices: Sequence[Any], sizes: Sequence[int], axes: str) -> np.ndarray:
    """The devices of one slice as an array of these sizes, in which the neighbors on an axis are near each other."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except AssertionError:  # jax lays out chips of one device; where a chip has two, they follow each other
        return np.asarray(devices).reshape(sizes)
    except (NotImplementedError, ValueError) as e:
        raise UserError(
            f"the mesh {axes} cannot be laid out on {plural(len(devices), 'device')} of kind "
            f"{devices[0].device_kind}: {e}"
        ) from None


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
    """The most mesh axes, from the first on, whose product divides a dimension of this size; None if none do.

    What `fsdp` shards, `context` shards too: the devices that share a row need not each hold the whole parameters.
    """
    axes = tuple(part for axis in axes for part in ((axis, "context") if axis == "fsdp" else (axis,)))
    axes = tuple(axis for axis in axes if axis != "context" or mesh.shape[axis] > 1)
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes[0] if len(axes) == 1 else axes or None


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that is replicated on every device."""
    return NamedSharding(mesh, P())


def mesh_context(arrays: PyTree) -> contextlib.AbstractContextManager:
    """A context in which programs are traced for the mesh of `arrays`, if they have one."""
    mesh = mesh_of(arrays)
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext()


def mesh_of(arrays: PyTree) -> Any:
    """The mesh of arrays or shapes, or None."""
    placed = (getattr(x, "sharding", None) for x in jax.tree.leaves(arrays))
    return next((s.mesh for s in placed if isinstance(s, NamedSharding)), None)


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


def num_token_shards(mesh: Mesh) -> int:
    """The number of shards of a batch's tokens: those of its rows, each in `context` parts."""
    return num_batch_shards(mesh) * mesh.shape["context"]


def check_batch_shape(rows: int, tokens: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide into microbatches over the mesh, or its rows over `context`."""
    shards = num_batch_shards(mesh)
    if rows % (shards * accumulate):
        raise UserError(
            f"data.batch_size {rows} is not divisible by {shards * accumulate}, the product of mesh.data "
            f"{mesh.shape['data']}, mesh.fsdp {mesh.shape['fsdp']} and optim.accumulate {accumulate}: use a multiple"
        )
    if tokens % mesh.shape["context"]:
        nearest = tokens + -tokens % mesh.shape["context"]
        raise UserError(
            f"data.seq_len {tokens} is not divisible by mesh.context {mesh.shape['context']}, which shards the tokens "
            f"of each row: use a multiple, such as {nearest}"
        )


def batch_sharding(mesh: Mesh, ndim: int, per_token: bool) -> NamedSharding:
    """The sharding of an array of a batch `[B, ...]`; where `per_token`, its last dimension is that of the tokens."""
    return NamedSharding(mesh, P(ROWS, *(None,) * (ndim - 2), "context") if per_token else P(ROWS))


def make_global_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, per_token: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Global arrays of a global `batch`, which every host holds; each device receives its rows and tokens.

    Several devices may hold the same part, on one host or on several. `per_token` names the arrays `[B, ..., T]` that
    have one value per token.
    """
    where = {name: batch_sharding(mesh, x.ndim, name in per_token) for name, x in batch.items()}
    return {name: jax.make_array_from_process_local_data(where[name], x, x.shape) for name, x in batch.items()}


def shard_tokens(x: jax.Array) -> jax.Array:
    """`x` `[B, T, ...]` with its rows and tokens sharded over the mesh of the program, where its axes divide them.

    The mesh is that of `jax.sharding.use_abstract_mesh`. The compiler decides on the other dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, tokens = (_present(axes, size, mesh) for axes, size in ((ROWS, x.shape[0]), (("context",), x.shape[1])))
    if not rows and not tokens:
        return x
    free = P.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, P(rows or free, tokens or free, *(free,) * (x.ndim - 2)))


def context_as_rows(x: jax.Array) -> jax.Array:
    """`[B, T, ...] -> [C * B, T / C, ...]`: each of the C parts into which `context` cuts a row becomes a row.

    No value moves between devices. Where the mesh of the program has no such axis, or it does not divide T, C is 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _present(("context",), x.shape[1], mesh):
        return x
    (rows, tokens, *rest), parts = x.shape, mesh.shape["context"]
    x = jnp.moveaxis(x.reshape(rows, parts, tokens // parts, *rest), 1, 0).reshape(parts * rows, tokens // parts, *rest)
    axes = ("context", *_present(ROWS, rows, mesh))
    return jax.lax.with_sharding_constraint(x, P(axes, *(P.UNCONSTRAINED,) * (x.ndim - 1)))


def shard_slots(x: jax.Array) -> jax.Array:
    """The slots of a cache, `[L, B, K, S, H]`, sharded over the program's mesh, if it has one, by `slots_spec`."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, slots_spec(x.shape, mesh))


def slots_spec(shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The spec of the slots of a cache, `[L, B, K, S, H]`: rows and heads are sharded where mesh axes divide them."""
    axes: list[Any] = [None, _present(ROWS, shape[1], mesh), _present(("tensor",), shape[2], mesh)]
    axes = [entry[0] if entry and len(entry) == 1 else entry or None for entry in axes]
    while axes and axes[-1] is None:  # one way to write a spec, as programs are kept by it
        axes.pop()
    return P(*axes)


def replicate(x: jax.Array) -> jax.Array:
    """`x` on every device of the program's mesh, so that each process can read it."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P())


def _present(axes: Sequence[str], size: int, mesh: Any) -> tuple[str, ...]:
    """Those of the mesh's `axes` that have several devices, if together they divide `size`; else none."""
    several = tuple(axis for axis in axes if not mesh.empty and mesh.shape.get(axis, 1) > 1)
    return () if size % math.prod(mesh.shape[axis] for axis in several) else several
