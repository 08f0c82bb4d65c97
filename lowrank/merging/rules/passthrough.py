"""One model's tensors as they are, or times a scale: what slices of several models are stacked with."""

import numpy as np

from lowrank.merging.blocks import combine
from lowrank.merging.rule import Group, Option, Rule, number


def _merge(group: Group) -> np.ndarray:
    scale = group.own[0]["scale"]
    return group.tensors[0] if scale == 1 else combine(group.tensors, [scale])


PASSTHROUGH = Rule(
    merge=_merge,
    options={"scale": Option(number, 1.0, per_model=True)},
    most=1,
    task_coefficients=lambda shared, own: [own[0]["scale"]],
)
