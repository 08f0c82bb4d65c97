"""DELLA (Deep et al. 2024, arXiv:2406.11617): small entries are dropped with a higher chance; signs as in TIES.

An entry is kept with a probability of `density - epsilon` for the smallest of its row up to `density + epsilon`. The
paper divides each survivor by its own probability (`rescale: inverse`), mergekit restores the sum of magnitudes (`l1`).
"""

from collections.abc import Sequence

import numpy as np

from lowrank.core.errors import UserError
from lowrank.merging import election, sparsify
from lowrank.merging.blocks import subtract
from lowrank.merging.rule import Group, Option, Rule, Values, check_divisor, number
from lowrank.merging.rules.dare_linear import INVERSE, OPTIONS
from lowrank.merging.rules.dare_ties import UNWEIGHTED

DELLA_OPTIONS = {**OPTIONS, "epsilon": Option(number, 0.15, per_model=True)}


def drop_group(group: Group) -> None:
    """Turns `group.tensors` into sparse task vectors."""
    subtract(group.tensors, group.base)
    for i, (x, own) in enumerate(zip(group.tensors, group.own, strict=True)):
        numbers = sparsify.generator(group.seed, i, group.name)
        sparsify.drop_by_rank(x, own["density"], own["epsilon"], group.shared["rescale"], numbers)
    election.record_kept(group)


def check_epsilon(shared: Values, own: Sequence[Values]) -> None:
    """Raises UserError for probabilities outside of (0, 1), and as `check_divisor` does."""
    check_divisor(shared, own)
    for values in own:
        density, epsilon = values["density"], values["epsilon"]
        if density < 1 and not (0 <= epsilon < min(density, 1 - density)):
            limit = min(density, 1 - density)
            raise UserError(
                f"epsilon={epsilon} with density={density} leaves probabilities outside of (0, 1): take an epsilon "
                f"below {limit:.4g}"
            )


def _merge(group: Group) -> np.ndarray:
    drop_group(group)
    return election.disjoint_sum(group)


DELLA = Rule(
    merge=_merge,
    options={**DELLA_OPTIONS, **election.SPARSE},
    presets={"paper": {**INVERSE, **UNWEIGHTED}, "peft": {**INVERSE, **UNWEIGHTED}},
    base=True,
    check=check_epsilon,
)
