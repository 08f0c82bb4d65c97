"""DARE (Yu et al. 2024, arXiv:2311.03099): drop entries of task vectors by chance, rescale the rest, and add them.

The paper and PEFT divide by the density (`rescale: inverse`), which keeps the expectation; mergekit restores the sum of
magnitudes of each tensor (`l1`). The draws depend on the seed, the model's place and the tensor's name alone.
"""

import numpy as np

from lowrank.merging import sparsify
from lowrank.merging.blocks import subtract
from lowrank.merging.election import record_kept, weighted_sum
from lowrank.merging.rule import DIVISOR, WEIGHT, Group, Option, Rule, check_divisor, choice, fraction, number

RESCALE = Option(choice("l1", "inverse", "none"), "l1")
INVERSE = {"rescale": "inverse"}
OPTIONS = {"weight": WEIGHT, "density": Option(fraction, 1.0, per_model=True), "rescale": RESCALE}


def drop_group(group: Group) -> None:
    """Turns `group.tensors` into sparse task vectors."""
    subtract(group.tensors, group.base)
    for i, (x, own) in enumerate(zip(group.tensors, group.own, strict=True)):
        numbers = sparsify.generator(group.seed, i, group.name)
        sparsify.drop(x, own["density"], group.shared["rescale"], numbers)
    record_kept(group)


def _merge(group: Group) -> np.ndarray:
    drop_group(group)
    return weighted_sum(group)


DARE_LINEAR = Rule(
    merge=_merge,
    options={**OPTIONS, "divisor": Option(DIVISOR, "none"), "lambda": Option(number, 1.0)},
    presets={"paper": INVERSE, "peft": INVERSE},
    base=True,
    check=check_divisor,
)
