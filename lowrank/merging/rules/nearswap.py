"""The base, with the entries at which another model is near swapped for that model's.

An entry whose distance is at most t is the other model's; beyond, the base moves by t towards it.
"""

import numpy as np

from lowrank.merging.blocks import blocks
from lowrank.merging.rule import Group, Option, Rule, positive

LEAST_DISTANCE = 1e-6


def _merge(group: Group) -> np.ndarray:
    assert group.base is not None
    t, a, b = group.shared["t"], group.base.reshape(-1), group.tensors[0].reshape(-1)
    for part in blocks(a.size):
        x, y = a[part].astype(np.float64), b[part].astype(np.float64)
        share = np.minimum(t / np.maximum(np.abs(x - y), LEAST_DISTANCE), 1.0)
        a[part] = share * y + (1 - share) * x
    return group.base


NEARSWAP = Rule(merge=_merge, options={"t": Option(positive)}, base=True, most=1)
