"""Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089): add task vectors to the base, or subtract them."""

from collections.abc import Sequence

import numpy as np

from lowrank.merging.blocks import subtract
from lowrank.merging.election import weighted_sum
from lowrank.merging.rule import DIVISOR, WEIGHT, Group, Option, Rule, Values, check_divisor, number
from lowrank.merging.rules import linear


def coefficients(shared: Values, own: Sequence[Values]) -> list[float]:
    """Lambda times the coefficients of `linear`."""
    return [shared["lambda"] * x for x in linear.coefficients(shared, own)]


def _merge(group: Group) -> np.ndarray:
    subtract(group.tensors, group.base)
    return weighted_sum(group)


TASK_ARITHMETIC = Rule(
    merge=_merge,
    options={"weight": WEIGHT, "divisor": Option(DIVISOR, "none"), "lambda": Option(number, 1.0)},
    base=True,
    task_coefficients=coefficients,
    check=check_divisor,
)
