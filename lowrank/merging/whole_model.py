"""What TIES reads of a whole model before it merges: thresholds of its magnitudes, and its majority sign.

The models are read a tensor at a time: twice for exact thresholds, by counts of the magnitudes' bits, and once for the
sign.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lowrank.merging.blocks import blocks, subtract
from lowrank.merging.election import elect
from lowrank.merging.rule import Groups, Values, weights
from lowrank.merging.sparsify import trim, trim_below

HALF = 16  # bits of a float32 that one reading counts


def is_needed(shared: Values) -> bool:
    """Whether the options ask for it."""
    return shared["trim"] == "model" or shared["zero_sign"] == "majority"


def survey(groups: Groups, shared: Values, own: Sequence[Values]) -> dict[str, Any]:
    """`{"thresholds": of each model, "sign": of the model}`, as far as the options ask for them."""
    result: dict[str, Any] = {}
    if shared["trim"] == "model":
        result["thresholds"] = thresholds(groups, [values["density"] for values in own])
    if shared["zero_sign"] == "majority":
        result["sign"] = _majority(groups, shared, own, result.get("thresholds"))
    return result


def thresholds(groups: Groups, densities: Sequence[float]) -> list[float]:
    """The magnitude that the entries of each model must have: of the n entries, `int(density * n) + 1` have it."""
    first = np.zeros((len(densities), 1 << HALF), np.int64)
    for i, bits in _bits(groups):
        first[i] += np.bincount(bits >> HALF, minlength=1 << HALF)
    wanted = [min(int(density * row.sum()) + 1, int(row.sum())) for density, row in zip(densities, first, strict=True)]
    high, rest = zip(*(_locate(row, k) for row, k in zip(first, wanted, strict=True)), strict=True)
    second = np.zeros_like(first)
    for i, bits in _bits(groups):
        second[i] += np.bincount(bits[bits >> HALF == high[i]] & ((1 << HALF) - 1), minlength=1 << HALF)
    low = [_locate(row, k)[0] for row, k in zip(second, rest, strict=True)]
    return [float(np.uint32((h << HALF) | b).view(np.float32)) for h, b in zip(high, low, strict=True)]


def _bits(groups: Groups) -> Iterator[tuple[int, np.ndarray]]:
    """`(model, bits of the magnitudes)` block by block; those of positive floats are ordered as the floats are."""
    for group in groups():
        subtract(group.tensors, group.base)
        for i, x in enumerate(group.tensors):
            flat = x.reshape(-1)
            for part in blocks(flat.size):
                yield i, np.abs(flat[part].astype(np.float32)).view(np.uint32).astype(np.int64)


def _locate(counts: np.ndarray, k: int) -> tuple[int, int]:
    """`(bucket of the k-th largest, its rank in the bucket)`, from 1."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, k))
    return len(counts) - 1 - place, k - int(above[place] - counts[::-1][place])


def _majority(groups: Groups, shared: Values, own: Sequence[Values], limits: Sequence[float] | None) -> float:
    total, w = 0.0, np.array(weights(own))[:, None]
    for group in groups():
        subtract(group.tensors, group.base)
        for i, x in enumerate(group.tensors):
            if limits:
                trim_below(x, limits[i])
            else:
                trim(x, own[i]["density"])
        flat = [x.reshape(-1) for x in group.tensors]
        for part in blocks(flat[0].size):
            rows = np.stack([x[part] for x in flat]).astype(np.float64)
            total += float(elect(rows, w, shared["election"]).sum())
    return 1.0 if total >= 0 else -1.0
