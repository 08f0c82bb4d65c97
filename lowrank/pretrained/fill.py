"""Leaves filled from a checkpoint, straight into their sharded layout.

One host buffer at a time, of the size of one shard of one leaf, is filled a few megabytes at a time, and the largest
leaves come first: the model is never in memory twice.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from lowrank.errors import UserError, nearest
from lowrank.pretrained.hf_tensors import Tensor
from lowrank.pretrained.stored import Stored

CHUNK_BYTES = 8 << 20


def check(
    where: str, tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]
) -> None:
    """Raises UserError naming the first tensor that is missing, or whose shape is not what its leaf needs."""
    used = {name for tensor in tensors for name in tensor.names}
    for tensor in tensors:
        for name in tensor.names:
            if name not in stored:
                raise UserError(f"{where}: tensor {name!r} is missing{nearest(name, stored.keys() - used)}")
            if not stored[name].readable:
                raise UserError(f"{where}: tensor {name!r} is {stored[name].dtype}, which cannot be read as floats")
            layer = shapes[tensor.leaf][len(tensor.stack) :]
            needed = layer[::-1] if tensor.transpose else layer
            if stored[name].shape != needed:
                raise UserError(f"{where}: tensor {name!r} has shape {stored[name].shape}, the config needs {needed}")


def fill(
    tensors: Sequence[Tensor],
    stored: Mapping[str, Stored],
    leaves: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """`{leaf name: array}`; `leaves` give each one's shape, dtype and sharding."""
    by_size = sorted(tensors, key=lambda t: -math.prod(leaves[t.leaf].shape))
    return {t.leaf: _leaf(t, [stored[name] for name in t.names], leaves[t.leaf]) for t in by_size}


def _leaf(tensor: Tensor, parts: Sequence[Stored], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Each distinct shard is read once and put on every device of this host that holds it."""
    sharding: Sharding = leaf.sharding
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        holders.setdefault(key, []).append(device)
    shards = []
    for index, devices in holders.items():
        buffer = _aligned([stop - start for start, stop in index], leaf.dtype)
        _read(tensor, parts, index, buffer)
        shards += jax.block_until_ready([jax.device_put(buffer, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: a CPU device then takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read(tensor: Tensor, parts: Sequence[Stored], index: tuple, out: np.ndarray) -> None:
    """Fills `out` with the part of the leaf that `index`, a (start, stop) for each axis, selects."""
    depth = len(tensor.stack)
    for place, part in zip(tensor.places, parts, strict=True):
        if all(start <= i < stop for i, (start, stop) in zip(place, index, strict=False)):
            here = tuple(i - start for i, (start, _) in zip(place, index, strict=False))
            _read_one(part, tensor.transpose != part.flipped, index[depth:], out[here])


def _read_one(part: Stored, transpose: bool, index: tuple, out: np.ndarray) -> None:
    if transpose:
        index, out = index[::-1], out.T
    (first, last), rest = index[0], tuple(slice(*pair) for pair in index[1:])
    shape = part.shape[::-1] if part.flipped else part.shape
    step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(first, last, step):
        stop = min(start + step, last)
        out[start - first : stop - first] = part.read(start, stop)[:, *rest]
