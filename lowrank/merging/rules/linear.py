"""The weighted mean of models (Wortsman et al. 2022, arXiv:2203.05482), or their weighted sum."""

from collections.abc import Sequence

import numpy as np

from lowrank.merging.blocks import combine
from lowrank.merging.rule import DIVISOR, WEIGHT, Group, Option, Rule, Values, check_divisor, weights


def coefficients(shared: Values, own: Sequence[Values]) -> list[float]:
    """The weights, divided by their sum where `divisor` is `weight`."""
    w = weights(own)
    total = sum(w) if shared["divisor"] == "weight" else 1.0
    return [x / total for x in w]


def _merge(group: Group) -> np.ndarray:
    return combine(group.tensors, coefficients(group.shared, group.own))


LINEAR = Rule(
    merge=_merge,
    options={"weight": WEIGHT, "divisor": Option(DIVISOR, "weight")},
    task_coefficients=coefficients,
    check=check_divisor,
)
