"""Leaves filled from a checkpoint, straight into their sharded layout.

One host buffer at a time, of the size of one shard of one leaf, is filled a few megabytes at a time, and the largest
leaves come first: the model is never in memory twice. A kernel that is to be quantised is read whole, one layer's at a
time, so that the host holds the codes, and one tensor.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank.core.errors import UserError, nearest
from lowrank.core.weight import is_weight
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.quantize_config import Quantization
from lowrank.pretrained.tensor_reader import Stored, finite
from lowrank.weights.quantized.base import Quantized

CHUNK_BYTES = 2 << 20


def check(
    where: str, tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]
) -> None:
    """Raises UserError naming the first tensor that is missing, or whose shape is not what its leaf needs."""
    used = {name for tensor in tensors for name in tensor.names}
    for tensor in tensors:
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


def fill(
    tensors: Sequence[Tensor],
    stored: Mapping[str, Stored],
    leaves: Mapping[str, Any],
    codes: Quantization | None = None,
) -> dict[str, Any]:
    """`{leaf name: array or form}`; `leaves` give each array's shape, dtype and sharding; `codes` makes the forms.

    Raises UserError for a tensor that is not finite.
    """
    by_size = sorted(tensors, key=lambda t: -math.prod(leaves[t.leaf].shape))
    kernels = [math.prod(leaf.shape[-2:]) for leaf in leaves.values() if is_weight(leaf)]
    room = _aligned([max(kernels, default=0)], np.dtype(np.float32))  # each kernel in turn: its codes are then done
    return {t.leaf: _filled(t, [stored[name] for name in t.names], leaves[t.leaf], codes, room) for t in by_size}


def _filled(tensor: Tensor, parts: Sequence[Stored], leaf: Any, codes: Quantization | None, room: np.ndarray) -> Any:
    if is_weight(leaf):
        return _quantised(tensor, parts, leaf, codes, room)
    shards = []
    for index, devices in _holders(leaf).items():
        buffer = _buffer(leaf, index)
        _read(tensor, parts, index, buffer)
        shards += jax.block_until_ready([jax.device_put(buffer, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


Index = tuple[tuple[int, int], ...]  # start and stop for each axis


def _holders(leaf: jax.ShapeDtypeStruct) -> dict[Index, list[jax.Device]]:
    """Each distinct shard of a leaf that this host has devices for, and these."""
    holders: dict[Index, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        holders.setdefault(key, []).append(device)
    return holders


def _buffer(leaf: jax.ShapeDtypeStruct, index: Index) -> np.ndarray:
    return _aligned([stop - start for start, stop in index], leaf.dtype)


def _quantised(
    tensor: Tensor, parts: Sequence[Stored], form: Quantized, codes: Quantization, room: np.ndarray
) -> Quantized:
    """The codes of a leaf, one layer after another; a host reads whole tensors, and keeps its own shards of them."""
    leaves, structure = jax.tree.flatten(form)
    buffers = [{index: _buffer(leaf, index) for index in _holders(leaf)} for leaf in leaves]
    kernel = room[: math.prod(form.shape[-2:])].reshape(form.shape[-2:])
    for place, name, part in zip(tensor.places, tensor.names, parts, strict=True):
        one = functools.partial(_read_whole, name, part, tensor.transpose != part.flipped, kernel)
        made = jax.tree.leaves(codes.layer(name, part, one, form))
        for array, pieces in zip(made, buffers, strict=True):
            _keep(np.asarray(array), place, pieces)
    return structure.unflatten(_placed(leaf, pieces) for leaf, pieces in zip(leaves, buffers, strict=True))


def whole(name: str, part: Stored, transpose: bool, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor as a kernel `[in, out]` in float32."""
    return _read_whole(name, part, transpose, _aligned(shape, np.dtype(np.float32)))


def _read_whole(name: str, part: Stored, transpose: bool, out: np.ndarray) -> np.ndarray:
    _read_one(name, part, transpose, tuple((0, size) for size in out.shape), out)
    return out


def _keep(array: np.ndarray, place: tuple[int, ...], buffers: Mapping[Index, np.ndarray]) -> None:
    """Copies each shard's part of one layer's array into its buffer; `place` is where in the stack the layer is."""
    for index, buffer in buffers.items():
        outer, inner = index[: len(place)], tuple(slice(*pair) for pair in index[len(place) :])
        if all(start <= i < stop for i, (start, stop) in zip(place, outer, strict=True)):
            buffer[tuple(i - start for i, (start, _) in zip(place, outer, strict=True))] = array[inner]


def _placed(leaf: jax.ShapeDtypeStruct, buffers: Mapping[Index, np.ndarray]) -> jax.Array:
    holders = _holders(leaf)
    arrays = [jax.device_put(buffer, device) for index, buffer in buffers.items() for device in holders[index]]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, jax.block_until_ready(arrays))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: a CPU device then takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read(tensor: Tensor, parts: Sequence[Stored], index: tuple, out: np.ndarray) -> None:
    """Fills `out` with the part of the leaf that `index`, a (start, stop) for each axis, selects."""
    depth = len(tensor.stack)
    for place, name, part in zip(tensor.places, tensor.names, parts, strict=True):
        if all(start <= i < stop for i, (start, stop) in zip(place, index, strict=False)):
            here = tuple(i - start for i, (start, _) in zip(place, index, strict=False))
            _read_one(name, part, tensor.transpose != part.flipped, index[depth:], out[(*here, ...)])


def _read_one(name: str, part: Stored, transpose: bool, index: tuple, out: np.ndarray) -> None:
    if not index:
        out[...] = finite(name, part.read(0, 1))[0]
        return
    if transpose:
        index, out = index[::-1], out.T
    (first, last), rest = index[0], tuple(slice(*pair) for pair in index[1:])
    shape = part.shape[::-1] if part.flipped else part.shape
    step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(first, last, step):
        stop = min(start + step, last)
        out[start - first : stop - first] = finite(name, part.read(start, stop)[:, *rest])
