"""The weighted mean of many models on the sphere in one step: the mean direction, times the mean length.

mergekit projects the models onto the tangent space at the mean direction and walks along their weighted sum. That sum
is zero at this point whatever the weights, so that the walk ends where it starts. Models that cancel are averaged.
With a base, task vectors stand for the models.
"""

from collections.abc import Sequence

import numpy as np

from lowrank.core.errors import UserError
from lowrank.merging.blocks import combine, gram, subtract
from lowrank.merging.rule import WEIGHT, Group, Option, Rule, Values, flag, weights

EPSILON = 1e-8


def coefficients(products: np.ndarray, w: Sequence[float]) -> np.ndarray:
    """The coefficients `[N]` of tensors whose inner products are `products` `[N, N]`."""
    shares, lengths = np.array(w), np.sqrt(np.diag(products))
    unit = shares / (lengths + EPSILON)
    length = float(np.sqrt(max(0.0, unit @ products @ unit)))
    return shares if length < EPSILON else unit * (shares @ lengths) / length


def _shares(shared: Values, own: Sequence[Values]) -> list[float]:
    w = weights(own)
    return [x / sum(w) for x in w] if shared["normalize_weights"] else w


def _check(shared: Values, own: Sequence[Values]) -> None:
    """Raises UserError for weights that sum to zero and are to be normalized."""
    if shared["normalize_weights"] and abs(sum(weights(own))) < 1e-8:
        raise UserError("the weights sum to zero: give one of them a positive weight, or set normalize_weights: false")


def _merge(group: Group) -> np.ndarray:
    shares = _shares(group.shared, group.own)
    if len(group.tensors) == 1:
        return group.tensors[0]
    if group.base is not None:
        subtract(group.tensors, group.base)
    merged = combine(group.tensors, list(coefficients(gram(group.tensors), shares)))
    if group.base is not None:
        merged += group.base
    return merged


MULTISLERP = Rule(
    merge=_merge,
    options={"weight": WEIGHT, "normalize_weights": Option(flag, True)},
    may_have_base=True,
    check=_check,
)
