"""Loading leaves from a checkpoint straight into their sharded layout, without a copy of the model on the host.

The host fills one buffer at a time, of the size of one shard of one leaf, a few megabytes at a time, and the largest
leaves come first. A kernel to be quantized is read whole, one layer at a time: the host then holds its codes and one
tensor.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from lowrank.core.errors import UserError, nearest
from lowrank.core.weight import is_weight
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.quantize_on_load import LoadQuantizer
from lowrank.pretrained.tensor_reader import StoredTensor, check_finite

CHUNK_BYTES = 2 << 20
Index = tuple[tuple[int, int], ...]  # start and stop per axis


def check_tensors(
    where: str, tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> None:
    """Raises UserError naming the first tensor that is missing, or whose shape or dtype does not suit its leaf."""
    used = {name for tensor in tensors for name in tensor.names}
    for tensor in tensors:
        if tensor.leaf not in shapes:
            raise UserError(f"{where}: its config has no place for tensor {tensor.names[0]!r}")
        for name in tensor.names:
            if name not in stored:
                raise UserError(f"{where}: tensor {name!r} is missing{nearest(name, stored.keys() - used)}")
            if tensor.dtype and stored[name].dtype != tensor.dtype:
                raise UserError(f"{where}: tensor {name!r} is {stored[name].dtype}, not {tensor.dtype}")
            if not tensor.dtype and not stored[name].readable:
                raise UserError(f"{where}: tensor {name!r} is {stored[name].dtype}, which cannot be read as floats")
            layer = shapes[tensor.leaf][len(tensor.stack) :]
            needed = layer[::-1] if tensor.transpose else layer
            if stored[name].shape != needed:
                raise UserError(f"{where}: tensor {name!r} has shape {stored[name].shape}, the config needs {needed}")


def load_leaves(
    tensors: Sequence[Tensor],
    stored: Mapping[str, StoredTensor],
    leaves: Mapping[str, Any],
    quantizer: LoadQuantizer | None = None,
) -> dict[str, Any]:
    """`{leaf name: array or form}`; `leaves` give shapes, dtypes and shardings, and `quantizer` makes the forms.

    Raises UserError for a tensor that is not finite.
    """
    by_size = sorted(tensors, key=lambda t: -math.prod(leaves[t.leaf].shape))
    kernels = [math.prod(leaf.shape[-2:]) for leaf in leaves.values() if is_weight(leaf)]
    scratch = _aligned([max(kernels, default=0)], np.float32)  # one kernel: its codes exist before the next is read

    def load_leaf(tensor: Tensor) -> Any:
        parts, leaf = [stored[name] for name in tensor.names], leaves[tensor.leaf]
        if not is_weight(leaf):
            return _load_array(tensor, parts, leaf)
        assert quantizer is not None
        return _load_form(tensor, parts, leaf, quantizer, scratch)

    return {tensor.leaf: load_leaf(tensor) for tensor in by_size}


def read_kernel(name: str, part: StoredTensor, transpose: bool, shape: Sequence[int]) -> np.ndarray:
    """One tensor as a kernel `[in, out]` in float32. Raises UserError for a tensor that is not finite."""
    return _read_into(_aligned(shape, np.float32), name, part, transpose)


def _load_array(tensor: Tensor, parts: Sequence[StoredTensor], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    shards = []
    for index, devices in _local_shards(leaf).items():
        buffer = _buffer(leaf, index)
        _read_shard(tensor, parts, index, buffer)
        shards += jax.block_until_ready([jax.device_put(buffer, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _load_form(
    tensor: Tensor, parts: Sequence[StoredTensor], form: Any, quantizer: LoadQuantizer, scratch: np.ndarray
) -> Any:
    """The codes of a leaf, one layer after another; a host reads whole tensors and keeps the shards of its devices."""
    leaves, structure = jax.tree.flatten(form)
    buffers = [{index: _buffer(leaf, index) for index in _local_shards(leaf)} for leaf in leaves]
    kernel = scratch[: math.prod(form.shape[-2:])].reshape(form.shape[-2:])
    for place, name, part in zip(tensor.places, tensor.names, parts, strict=True):
        read = functools.partial(_read_into, kernel, name, part, tensor.transpose != part.flipped)
        arrays = jax.tree.leaves(quantizer.quantize_layer(name, part, read, form))
        for array, shards in zip(arrays, buffers, strict=True):
            _copy_layer(np.asarray(array), place, shards)
    return jax.tree.unflatten(structure, map(_put_shards, leaves, buffers))


def _local_shards(leaf: Any) -> dict[Index, list[jax.Device]]:
    """Each distinct shard of a leaf on the devices of this host, and these devices."""
    shards: dict[Index, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        shards.setdefault(key, []).append(device)
    return shards


def _buffer(leaf: Any, index: Index) -> np.ndarray:
    return _aligned([stop - start for start, stop in index], leaf.dtype)


def _aligned(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: a CPU device then uses it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy_layer(array: np.ndarray, place: tuple[int, ...], buffers: Mapping[Index, np.ndarray]) -> None:
    """Copies each shard's part of one layer's array into its buffer; `place` is the layer's index in the stack."""
    for index, buffer in buffers.items():
        outer, inner = index[: len(place)], tuple(slice(*pair) for pair in index[len(place) :])
        if all(start <= i < stop for i, (start, stop) in zip(place, outer, strict=True)):
            buffer[tuple(i - start for i, (start, _) in zip(place, outer, strict=True))] = array[inner]


def _put_shards(leaf: Any, buffers: Mapping[Index, np.ndarray]) -> jax.Array:
    devices = _local_shards(leaf)
    arrays = [jax.device_put(buffer, device) for index, buffer in buffers.items() for device in devices[index]]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, jax.block_until_ready(arrays))


def _read_shard(tensor: Tensor, parts: Sequence[StoredTensor], index: Index, out: np.ndarray) -> None:
    """Fills `out` with the part of the leaf that `index` selects."""
    depth = len(tensor.stack)
    if tensor.absent:
        out[...] = 1
    for place, name, part in zip(tensor.places, tensor.names, parts, strict=True):
        if all(start <= i < stop for i, (start, stop) in zip(place, index, strict=False)):
            here = tuple(i - start for i, (start, _) in zip(place, index, strict=False))
            _read_part(name, part, tensor.transpose != part.flipped, index[depth:], out[(*here, ...)])


def _read_into(out: np.ndarray, name: str, part: StoredTensor, transpose: bool) -> np.ndarray:
    _read_part(name, part, transpose, tuple((0, size) for size in out.shape), out)
    return out


def _read_part(name: str, part: StoredTensor, transpose: bool, index: Index, out: np.ndarray) -> None:
    if not index:
        out[...] = check_finite(name, part.read(0, 1))[0]
        return
    if transpose:
        index, out = index[::-1], out.T
    (first, last), rest = index[0], tuple(slice(*pair) for pair in index[1:])
    shape = part.shape[::-1] if part.flipped else part.shape
    step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(first, last, step):
        stop = min(start + step, last)
        out[start - first : stop - first] = check_finite(name, part.read(start, stop)[:, *rest])
