"""SCE (Wan et al. 2024, arXiv:2408.07990): select entries by their variance, weigh models by energy, erase by sign.

Of the entries at which the task vectors differ, the share `select_topk` of largest variance is kept. A model's weight
is the mean square of what it kept, and entries against the sign of the sum are left out of the weighted mean. mergekit
weighs all models alike where these mean squares sum to less than 1e-6, which those of small updates do: `floor`.
"""

import numpy as np

from lowrank.merging.blocks import blocks, subtract
from lowrank.merging.election import record_kept
from lowrank.merging.rule import Group, Option, Rule, fraction, share

LEAST_DIVISOR = 1e-6


def select(tensors: list[np.ndarray], share: float) -> None:
    """Keeps the entries of largest variance, `int(share * n)` of the n entries at which the arrays differ."""
    flat = [x.reshape(-1) for x in tensors]

    def variance(part: slice) -> np.ndarray:
        return np.stack([x[part] for x in flat]).astype(np.float64).var(0).astype(flat[0].dtype)

    spread = np.empty_like(flat[0])
    for part in blocks(spread.size):
        spread[part] = variance(part)
    count = int(np.count_nonzero(spread) * share)
    threshold = np.inf
    if count:
        spread.partition(spread.size - count)
        threshold = spread[spread.size - count]
    left = count - int(np.count_nonzero(spread > threshold))
    del spread
    for part in blocks(flat[0].size):
        values = variance(part)
        keep = values > threshold
        equal = np.flatnonzero(values == threshold)[:left]
        keep[equal], left = True, left - len(equal)
        for x in flat:
            x[part] *= keep


def energies(tensors: list[np.ndarray], floor: float) -> np.ndarray:
    """The shares `[N]` of the arrays' mean squares, equal ones where their sum is below `floor` or zero."""
    squares = np.zeros(len(tensors))
    for i, x in enumerate(tensors):
        flat = x.reshape(-1)
        for part in blocks(flat.size):
            values = flat[part].astype(np.float64)
            squares[i] += float(np.einsum("n,n", values, values))
    squares /= max(1, tensors[0].size)
    total = squares.sum()
    return np.full(len(tensors), 1 / len(tensors)) if total < floor or total == 0 else squares / total


def _merge(group: Group) -> np.ndarray:
    assert group.base is not None
    subtract(group.tensors, group.base)
    if group.shared["select_topk"] < 1:
        select(group.tensors, group.shared["select_topk"])
    record_kept(group)
    w = energies(group.tensors, group.shared["floor"])[:, None]
    flat, out = [x.reshape(-1) for x in group.tensors], group.base.reshape(-1)
    for part in blocks(out.size):
        rows = np.stack([x[part] for x in flat]).astype(np.float64)
        agree = np.sign(rows) == np.where(rows.sum(0) >= 0, 1.0, -1.0)
        out[part] = out[part] + (w * rows * agree).sum(0) / np.maximum((w * agree).sum(0), LEAST_DIVISOR)
    return group.base


SCE = Rule(
    merge=_merge,
    options={"select_topk": Option(fraction, 1.0), "floor": Option(share, 1e-6)},
    presets={"paper": {"floor": 0.0}},
    base=True,
)
