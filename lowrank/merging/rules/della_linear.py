"""DELLA without an election of signs, see `della`: the sparse task vectors are added."""

import numpy as np

from lowrank.merging.election import weighted_sum
from lowrank.merging.rule import DIVISOR, Group, Option, Rule, number
from lowrank.merging.rules.dare_linear import INVERSE
from lowrank.merging.rules.della import DELLA_OPTIONS, check_epsilon, drop_group


def _merge(group: Group) -> np.ndarray:
    drop_group(group)
    return weighted_sum(group)


DELLA_LINEAR = Rule(
    merge=_merge,
    options={**DELLA_OPTIONS, "divisor": Option(DIVISOR, "none"), "lambda": Option(number, 1.0)},
    presets={"paper": INVERSE, "peft": INVERSE},
    base=True,
    check=check_epsilon,
)
