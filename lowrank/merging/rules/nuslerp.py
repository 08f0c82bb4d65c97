"""Spherical interpolation of two models, or of their task vectors where there is a base, by normalized weights.

The second model has the share t = w_2 / (w_1 + w_2). As in mergekit, whose names the options keep, the angle is that of
the flattened tensors, or with `nuslerp_flatten: false` one of each row, or of each column with `nuslerp_row_wise`.
Vectors whose angle is too small for a float are interpolated along the line, and so are opposite ones.
"""

from collections.abc import Sequence

import numpy as np

from lowrank.merging.blocks import BLOCK, subtract
from lowrank.merging.rule import WEIGHT, Group, Option, Rule, Values, flag, weights

SHORTEST = 1e-7  # a length below it is not divided by
LEAST_SINE = 1e-8


def arcs(products: np.ndarray, t: float) -> np.ndarray:
    """The coefficients `[2, n]` of n pairs of vectors, whose inner products are `products` `[3, n]`: aa, bb and ab."""
    lengths = np.maximum(np.sqrt(products[:2]), SHORTEST)
    cosine = np.clip(products[2] / (lengths[0] * lengths[1]), -1, 1)
    line = 1 - cosine**2 <= LEAST_SINE**2
    angle = np.arccos(np.where(line, 0.0, cosine))
    on_arc = np.sin(np.stack([(1 - t) * angle, t * angle])) / np.sin(angle)
    return np.where(line, np.array([[1 - t], [t]]), on_arc)


def _merge(group: Group) -> np.ndarray:
    first, second = weights(group.own)
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if group.base is not None:
        subtract(group.tensors, group.base)
    a, b = (_as_matrix(x, group.shared) for x in group.tensors)
    by_column = group.shared["nuslerp_row_wise"] and not group.shared["nuslerp_flatten"]
    along = 0 if by_column and group.tensors[0].ndim > 1 else 1
    products = np.zeros((3, a.shape[1 - along]))
    for place in _parts(a.shape):
        x, y = a[place].astype(np.float64), b[place].astype(np.float64)
        sums = np.stack([(u * v).sum(along) for u, v in ((x, x), (y, y), (x, y))])
        products[:, place[1 - along]] += sums
    left, right = (np.expand_dims(c, along) for c in arcs(products, t))
    for place in _parts(a.shape):
        own = (slice(None), place[1]) if along == 0 else (place[0], slice(None))
        a[place] = left[own] * a[place] + right[own] * b[place].astype(np.float64)
    if group.base is not None:
        group.tensors[0] += group.base
    return group.tensors[0]


def _as_matrix(x: np.ndarray, shared: Values) -> np.ndarray:
    """A view `[rows, columns]`; the vectors between which an angle is taken run along one of its axes."""
    if shared["nuslerp_flatten"] or x.ndim < 2:
        return x.reshape(1, -1)
    return x.reshape(len(x), -1) if shared["nuslerp_row_wise"] else x.reshape(-1, x.shape[-1])


def _parts(shape: Sequence[int]) -> list[tuple[slice, slice]]:
    """Blocks of a matrix, of some whole rows or of a part of one."""
    rows, columns = shape
    high, wide = max(1, BLOCK // max(1, columns)), min(columns, BLOCK)
    return [
        (slice(i, min(i + high, rows)), slice(j, min(j + wide, columns)))
        for i in range(0, rows, high)
        for j in range(0, columns, wide)
    ]


NUSLERP = Rule(
    merge=_merge,
    options={"weight": WEIGHT, "nuslerp_flatten": Option(flag, True), "nuslerp_row_wise": Option(flag, False)},
    may_have_base=True,
    least=2,
    most=2,
)
