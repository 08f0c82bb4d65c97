"""Breadcrumbs before the election of TIES: see `breadcrumbs` and `ties`."""

import numpy as np

from lowrank.merging import election
from lowrank.merging.rule import Group, Rule, check_divisor
from lowrank.merging.rules.breadcrumbs import OPTIONS, trim_group
from lowrank.merging.rules.dare_ties import UNWEIGHTED


def _merge(group: Group) -> np.ndarray:
    trim_group(group)
    return election.disjoint_sum(group)


BREADCRUMBS_TIES = Rule(
    merge=_merge,
    options={**OPTIONS, **election.UNDIVIDED},
    presets={"paper": UNWEIGHTED, "peft": UNWEIGHTED},
    base=True,
    check=check_divisor,
)
