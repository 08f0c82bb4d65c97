"""Spherical interpolation of two models: along the great circle from the first (or the base), t = 0, to the other.

The angle is that of the flattened tensors, whose lengths are not normalized. Tensors that are parallel, or opposite,
up to a cosine of 0.9995 are interpolated along the line, so that the middle of W and -W is 0.
"""

import numpy as np

from lowrank.merging.blocks import combine, gram
from lowrank.merging.rule import Group, Option, Rule, share

PARALLEL = 0.9995


def arc(products: np.ndarray, t: float) -> tuple[float, float]:
    """The coefficients of two tensors, whose inner products are `products` `[2, 2]`, at `t`."""
    lengths = np.sqrt(np.diag(products))
    lengths[lengths <= 1e-8] = 1.0
    cosine = float(np.clip(products[0, 1] / (lengths[0] * lengths[1]), -1, 1))
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = np.arccos(cosine)
    return float(np.sin((1 - t) * angle) / np.sin(angle)), float(np.sin(t * angle) / np.sin(angle))


def _merge(group: Group) -> np.ndarray:
    return combine(group.tensors, arc(gram(group.tensors), group.shared["t"]))


SLERP = Rule(merge=_merge, options={"t": Option(share)}, least=2, most=2, base_first=True)
