"""TIES (Yadav et al. 2023, arXiv:2306.01708): trim task vectors, elect a sign per entry, average those that agree.

Its readings differ, and a preset chooses one:

| preset | trim | election | divisor |
|---|---|---|---|
| `paper` | the largest 20 % of the whole model, ties at the threshold kept | of unweighted vectors; a sum of zero takes the model's majority sign | number that agree |
| `mergekit` | the largest `density` of each tensor | of weighted vectors; zero is positive | weights that agree |
| `peft` | the same | of unweighted vectors; zero is positive | number that agree |
"""  # noqa: E501

import numpy as np

from lowrank.merging import whole_model
from lowrank.merging.blocks import subtract
from lowrank.merging.election import OPTIONS, disjoint_sum, record_kept
from lowrank.merging.rule import WEIGHT, Group, Option, Rule, check_divisor, choice, fraction
from lowrank.merging.sparsify import trim, trim_below


def trim_group(group: Group) -> None:
    """Trims the task vectors `group.tensors`."""
    for i, (x, own) in enumerate(zip(group.tensors, group.own, strict=True)):
        if group.shared["trim"] == "model":
            trim_below(x, group.survey["thresholds"][i])
        else:
            trim(x, own["density"])


def _merge(group: Group) -> np.ndarray:
    subtract(group.tensors, group.base)
    trim_group(group)
    record_kept(group)
    return disjoint_sum(group)


TIES = Rule(
    merge=_merge,
    options={
        "weight": WEIGHT,
        "density": Option(fraction, 1.0, per_model=True),
        "trim": Option(choice("tensor", "model"), "tensor", whole=True),
        **OPTIONS,
    },
    presets={
        "paper": {
            "weight": 1.0,
            "density": 0.2,
            "trim": "model",
            "election": "unweighted",
            "divisor": "count",
            "zero_sign": "majority",
        },
        "peft": {"election": "unweighted", "divisor": "count"},
    },
    base=True,
    survey=whole_model.survey,
    surveys=whole_model.is_needed,
    check=check_divisor,
)
