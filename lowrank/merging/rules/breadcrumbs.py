"""Breadcrumbs (Davari and Belilovsky 2024, arXiv:2312.06795): both ends of a task vector's magnitudes are dropped."""

import numpy as np

from lowrank.merging.blocks import subtract
from lowrank.merging.election import record_kept, weighted_sum
from lowrank.merging.rule import DIVISOR, WEIGHT, Group, Option, Rule, check_divisor, fraction, number, share
from lowrank.merging.sparsify import trim_both_ends

OPTIONS = {
    "weight": WEIGHT,
    "density": Option(fraction, 1.0, per_model=True),
    "gamma": Option(share, 0.01, per_model=True),
}


def trim_group(group: Group) -> None:
    """Turns `group.tensors` into sparse task vectors."""
    subtract(group.tensors, group.base)
    for x, own in zip(group.tensors, group.own, strict=True):
        trim_both_ends(x, own["density"], own["gamma"])
    record_kept(group)


def _merge(group: Group) -> np.ndarray:
    trim_group(group)
    return weighted_sum(group)


BREADCRUMBS = Rule(
    merge=_merge,
    options={**OPTIONS, "divisor": Option(DIVISOR, "none"), "lambda": Option(number, 1.0)},
    base=True,
    check=check_divisor,
)
