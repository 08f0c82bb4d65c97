"""Fisher averaging (Matena and Raffel 2022, arXiv:2111.09832): each entry is weighted by its Fisher information."""

import numpy as np

from lowrank.merging.blocks import blocks
from lowrank.merging.rule import Group, Option, Rule, check_divisor, number, positive, weights


def _merge(group: Group) -> np.ndarray:
    """The weighted mean, entry by entry; where no model has any information, that of the weights alone."""
    w, floor = np.array(weights(group.own))[:, None], group.shared["floor"]
    flat = [x.reshape(-1) for x in group.tensors]
    fisher = [s["fisher"].reshape(-1) for s in group.statistics]
    for part in blocks(flat[0].size):
        rows = np.stack([x[part] for x in flat]).astype(np.float64)
        gains = w * np.maximum(np.stack([f[part] for f in fisher]).astype(np.float64), floor)
        flat[0][part] = (gains * rows).sum(0) / gains.sum(0)
    return group.tensors[0]


FISHER = Rule(
    merge=_merge,
    options={"weight": Option(number, 1.0, per_model=True), "floor": Option(positive, 1e-8)},
    least=2,
    check=lambda shared, own: check_divisor({"divisor": "weight"}, own),
    statistics="fisher",
)
