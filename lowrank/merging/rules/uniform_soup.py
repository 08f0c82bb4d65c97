"""The mean of models with equal weights (Wortsman et al. 2022, arXiv:2203.05482)."""

from collections.abc import Sequence

import numpy as np

from lowrank.merging.blocks import combine
from lowrank.merging.rule import Group, Rule, Values


def coefficients(shared: Values, own: Sequence[Values]) -> list[float]:
    """One N-th for each of the N models."""
    del shared
    return [1 / len(own)] * len(own)


def merge(group: Group) -> np.ndarray:
    """The mean of the tensors."""
    return combine(group.tensors, coefficients(group.shared, group.own))


UNIFORM_SOUP = Rule(merge=merge, options={}, task_coefficients=coefficients)
