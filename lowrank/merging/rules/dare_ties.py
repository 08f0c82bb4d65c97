"""DARE before the election of TIES: entries are dropped by chance, see `dare_linear`, and signs elected, see `ties`."""

import numpy as np

from lowrank.merging import election
from lowrank.merging.rule import Group, Rule, check_divisor
from lowrank.merging.rules.dare_linear import INVERSE, OPTIONS, drop_group

UNWEIGHTED = {"election": "unweighted", "divisor": "count"}


def _merge(group: Group) -> np.ndarray:
    drop_group(group)
    return election.disjoint_sum(group)


DARE_TIES = Rule(
    merge=_merge,
    options={**OPTIONS, **election.UNDIVIDED},
    presets={"paper": {**INVERSE, **UNWEIGHTED}, "peft": {**INVERSE, **UNWEIGHTED}},
    base=True,
    check=check_divisor,
)
