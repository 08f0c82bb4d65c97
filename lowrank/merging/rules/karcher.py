"""The Karcher mean: the point of the sphere with the least sum of squared angles, times the models' mean length.

It lies in the span of the models, so that the iteration runs on N coefficients and inner products alone.
"""

from collections.abc import Sequence

import numpy as np

from lowrank.merging.blocks import combine, gram
from lowrank.merging.rule import Group, Option, Rule, count, number, weights
from lowrank.merging.rules.sequential_slerp import check_weights


def coefficients(products: np.ndarray, w: Sequence[float], max_iter: int, tol: float) -> np.ndarray:
    """The coefficients `[N]` of tensors whose inner products are `products` `[N, N]`; tensors of zeros have none."""
    lengths, shares = np.sqrt(np.diag(products)), np.array(w) / sum(w)
    present = lengths > tol
    if not present.any():
        return np.zeros(len(w))
    inverse = np.where(present, 1 / np.where(present, lengths, 1.0), 0.0)
    cosines = products * inverse[:, None] * inverse  # of the unit vectors, in whose coefficients the mean is
    a = np.where(present, shares, 0.0) / shares[present].sum()
    mean = a / length if (length := _length(a, cosines)) >= tol else np.eye(len(w))[int(np.argmax(present))]
    for _ in range(max_iter):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        step = np.where(angles < tol, 0.0, a * angles / np.sin(np.where(angles < tol, 1.0, angles)))
        tangent = step - (step @ along) * mean
        size = _length(tangent, cosines)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
        mean /= _length(mean, cosines)
    return (shares @ lengths) * mean * inverse


def _length(a: np.ndarray, cosines: np.ndarray) -> float:
    return float(np.sqrt(max(0.0, a @ cosines @ a)))


def _merge(group: Group) -> np.ndarray:
    values = (weights(group.own), group.shared["max_iter"], group.shared["tol"])
    return combine(group.tensors, list(coefficients(gram(group.tensors), *values)))


KARCHER = Rule(
    merge=_merge,
    options={
        "weight": Option(number, 1.0, per_model=True),
        "max_iter": Option(count, 10),
        "tol": Option(number, 1e-5),
    },
    presets={"paper": {"max_iter": 100, "tol": 1e-10}},
    least=2,
    check=check_weights,
)
