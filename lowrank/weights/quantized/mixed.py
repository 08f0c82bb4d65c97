"""Kernels with 2 and 4 bits mixed, within a budget of bits per weight.

A group of `block` inputs is stored in NF4 or in two bits. The groups whose squared error 4 bits reduce the most get
them. Their number is the same for all layers of a stack, whose shapes must agree; `lowrank.pretrained.quantize_on_load`
divides one budget among the stacks of a model.
"""

import dataclasses
import heapq
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.core.errors import UserError
from lowrank.core.weight import Weight, dot_to_float32, form, frozen, static
from lowrank.weights.quantized import codebook, lookup_tables
from lowrank.weights.quantized.double_quantization import SECOND_BLOCK
from lowrank.weights.quantized.packing import split_blocks

TABLES = {4: "nf4", 2: "n2"}


@form
class Mixed(Weight):
    """`high` NF4 `[..., k * block, out]` and `low` N2 `[..., (n - k) * block, out]`; either is None if it is empty.

    `index` int32 `[..., n]` holds the numbers of their groups of inputs, first those of `high`, then those of `low`.
    """

    high: Any = frozen()
    low: Any = frozen()
    index: jax.Array = frozen()
    block: int = static()
    rows: int = static()

    stored: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[Any, ...]:
        """Those of `high` and `low` that are not empty."""
        return tuple(part for part in (self.high, self.low) if part is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in, out]`."""
        first = self.parts[0].shape
        return (*first[:-2], self.rows, first[-1])

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized kernel."""
        return self.parts[0].dtype

    def with_dtype(self, dtype_name: str) -> Self:
        """The same codes, dequantized to the dtype `dtype_name`."""
        high, low = (part and part.with_dtype(dtype_name) for part in (self.high, self.low))
        return dataclasses.replace(self, high=high, low=low)

    def materialize(self) -> jax.Array:
        """The dequantized kernel `[..., in, out]`, with its groups in their original order."""
        kernel = jnp.concatenate([part.materialize() for part in self.parts], axis=-2)
        groups = kernel.reshape(*kernel.shape[:-2], -1, self.block, kernel.shape[-1])
        order = jnp.argsort(self.index, axis=-1)
        groups = jnp.take_along_axis(groups, order[..., None, None], axis=-3)
        return groups.reshape(kernel.shape)[..., : self.rows, :]

    def dot_to_float32(self, x: jax.Array) -> jax.Array:
        """`x[high] @ high + x[low] @ low`, where the inputs are reordered, not the kernel."""
        n = self.index.shape[-1]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * self.block - self.rows)])
        groups = jnp.take(x.reshape(*x.shape[:-1], n, self.block), self.index, axis=-2, unique_indices=True)
        y: Any = 0
        x, first = groups.reshape(x.shape), 0
        for part in self.parts:
            y = y + dot_to_float32(x[..., first : first + part.rows], part)
            first += part.rows
        return y


def quantize(w: jax.Array, *, high: int, block: int, double: bool) -> Mixed:
    """A kernel `[..., in, out]` with `high` groups of each layer in 4 bits, those whose error 4 bits reduce the most.

    `double` quantizes the scales to 8 bits.
    """
    groups, inside = _split_groups(w, block)
    index = jnp.argsort(-_error_reductions(groups, inside), axis=-1, stable=True)
    index = jnp.concatenate([jnp.sort(index[..., :high]), jnp.sort(index[..., high:])], axis=-1)
    order = index[..., None, None]
    groups, inside = (jnp.take_along_axis(x, order, axis=-3) for x in (groups, inside))
    parts: dict[str, codebook.Codebook | None] = {}
    for name, bits, selection in (("high", 4, slice(None, high)), ("low", 2, slice(high, None))):
        part, part_inside = (x[..., selection, :, :] for x in (groups, inside))
        flat = part.reshape(*w.shape[:-2], -1, w.shape[-1]).astype(w.dtype)
        options: dict[str, Any] = {
            "table": TABLES[bits],
            "block": groups.shape[-2],
            "double": double,
            "inside": part_inside,
        }
        parts[name] = codebook.quantize(flat, **options) if flat.shape[-2] else None
    return Mixed(**parts, index=index.astype(jnp.int32), block=groups.shape[-2], rows=w.shape[-2])


def error_reductions(w: jax.Array, block: int) -> jax.Array:
    """The reduction `[..., n]` of the squared error of each group of inputs by 4 bits instead of 2."""
    return _error_reductions(*_split_groups(w, block))


def _error_reductions(groups: jax.Array, inside: jax.Array) -> jax.Array:
    errors = {}
    for bits, table in TABLES.items():
        codes, scale = codebook.encode_blocks(groups, None, table, inside)
        values = lookup_tables.lookup(codes, lookup_tables.TABLES[table]) * jnp.broadcast_to(
            scale[..., None, :], codes.shape
        )
        errors[bits] = jnp.sum((values - groups) ** 2 * jnp.broadcast_to(inside, groups.shape), axis=(-2, -1))
    return errors[2] - errors[4]


def _split_groups(w: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """`(groups [..., n, block, out], inside [..., n, block, 1])`; `inside` is 1 for rows of the kernel, else 0."""
    block = clip_block(w.shape[-2], block)
    return split_blocks(w, block, 4), split_blocks(jnp.ones((*w.shape[:-1], 1)), block, 4)


def clip_block(rows: int, block: int) -> int:
    """The block, or the smallest multiple of 4 that holds a kernel of `rows` inputs, if that is smaller."""
    return min(block, -(-rows // 4) * 4)


def total_bits(shape: tuple[int, ...], high: int, block: int, double: bool) -> int:
    """The bits of a Mixed of this shape with `high` groups in 4 bits: those of its codes, scales and index."""
    *stack, rows, out = shape
    block = clip_block(rows, block)
    n = -(-rows // block)

    def part(k: int, bits: int) -> int:
        scales = k * out * 8 + 32 * -(-k * out // SECOND_BLOCK) + 32 if double else 32 * k * out
        return k * block * out * bits + scales if k else 0

    return math.prod(stack) * (part(high, 4) + part(n - high, 2) + 32 * n)


def allocate_groups(
    gain: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], budget: float, block: int, double: bool
) -> dict[str, int]:
    """The number of groups in 4 bits, for each kernel `[..., in, out]` or stack of kernels, within the budget.

    Args:
      gain: the `error_reductions` `[..., n]` of each kernel. The gain of the k-th group of a stack is the sum, over its
        layers, of each layer's k-th largest.
      shapes: the shape of each kernel.
      budget: the most bits per weight, all kernels together, with their scales and indices.
      block: the number of inputs in a group.
      double: whether the scales are quantized to 8 bits.

    Groups are taken in the order of their gain per bit while they fit, which is optimal up to the bits that the last
    group leaves unused. Raises UserError if 2 bits for all groups exceed the budget.
    """
    gains = {n: np.sort(g.reshape(-1, g.shape[-1]), axis=-1)[:, ::-1].sum(0) for n, g in gain.items()}
    cost = lambda name, k: total_bits(shapes[name], k, block, double)  # noqa: E731
    weights = sum(math.prod(shape) for shape in shapes.values())
    room = budget * weights - sum(cost(name, 0) for name in shapes)
    if room < 0:
        least = budget - room / weights
        raise UserError(
            f"quantize.budget {budget} is too small: 2 bits with their scales take {least:.3f} bits per weight"
        )
    high = dict.fromkeys(shapes, 0)

    def next_group(name: str) -> tuple[float, str]:
        k = high[name]
        return -float(gains[name][k]) / (cost(name, k + 1) - cost(name, k)), name

    queue = [next_group(name) for name in shapes]
    heapq.heapify(queue)
    while queue:
        name = heapq.heappop(queue)[1]
        more = cost(name, high[name] + 1) - cost(name, high[name])
        if more <= room:
            room -= more
            high[name] += 1
            if high[name] < len(gains[name]):
                heapq.heappush(queue, next_group(name))
    return high


def quantize_within_budget(w: jax.Array, *, budget: float, block: int, double: bool) -> Mixed:
    """A kernel `[..., in, out]` within `budget` bits per weight. Raises UserError if 2 bits exceed the budget."""
    n = -(-w.shape[-2] // clip_block(w.shape[-2], block))
    high = allocate_groups({"": np.ones(n)}, {"": w.shape}, budget, block, double)[""]
    return quantize(w, high=high, block=block, double=double)
