"""Spherical interpolation of many models in turn: model k joins the result so far at its share of the weights.

The result depends on the order of the models; that of `karcher` does not.
"""

from collections.abc import Sequence

import numpy as np

from lowrank.core.errors import UserError
from lowrank.merging.blocks import combine, gram
from lowrank.merging.rule import Group, Option, Rule, Values, number, weights
from lowrank.merging.rules.slerp import arc


def coefficients(products: np.ndarray, w: Sequence[float]) -> np.ndarray:
    """The coefficients `[N]` of tensors whose inner products are `products` `[N, N]`."""
    mean = np.eye(len(w))[0]
    for k in range(1, len(w)):
        pair = np.stack([mean, np.eye(len(w))[k]])
        a, b = arc(pair @ products @ pair.T, w[k] / sum(w[: k + 1]))
        mean = a * pair[0] + b * pair[1]
    return mean


def check_weights(shared: Values, own: Sequence[Values]) -> None:
    """Raises UserError for a weight that is not positive."""
    del shared
    if (least := min(weights(own))) <= 0:
        raise UserError(f"weight={least}: a mean on the sphere needs positive weights")


def _merge(group: Group) -> np.ndarray:
    return combine(group.tensors, list(coefficients(gram(group.tensors), weights(group.own))))


SEQUENTIAL_SLERP = Rule(
    merge=_merge, options={"weight": Option(number, 1.0, per_model=True)}, least=2, check=check_weights
)
