"""Which entries of kernels are kept: those of the highest scores, in exact numbers, by rank and never by a threshold.

Scores are arrays `[..., in, out]`, and groups run along `in`, which a product sums over. Of equal scores the one of the
lower index is kept. A share that no whole number of entries meets is rounded down, so that a mask is never sparser than
was asked.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lowrank.core.errors import UserError, unknown

ROUNDING = 1e-9  # of a share times a number of entries: 0.29 * 100 is below 29


def pruned_count(entries: int, sparsity: float) -> int:
    """How many of the entries are pruned. Raises UserError for a sparsity that is not in [0, 1]."""
    check_sparsity(sparsity)
    return math.floor(entries * sparsity + ROUNDING * entries)


def check_sparsity(sparsity: float) -> None:
    """Raises UserError for a sparsity that is not in [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity={sparsity} is not in [0, 1]")


def by_kernel(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Bool `[in, out]`: the best entries of a kernel, wherever they are."""
    kept = scores.size - pruned_count(scores.size, sparsity)
    return (ranks(scores.reshape(-1), 0) < kept).reshape(scores.shape)


def by_output(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Bool `[in, out]`: the best entries of each output, which all keep equally many."""
    return ranks(scores, 0) < len(scores) - pruned_count(len(scores), sparsity)


WITHIN: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {"kernel": by_kernel, "output": by_output}


def within(name: str) -> Callable[[np.ndarray, float], np.ndarray]:
    """The function of `WITHIN` that has this name. Raises UserError for an unknown one."""
    if name not in WITHIN:
        raise unknown("within", name, WITHIN)
    return WITHIN[name]


def by_model(scores: Mapping[str, np.ndarray], sparsity: float) -> dict[str, np.ndarray]:
    """Bool by name: the best entries of all kernels together, whose scores must be comparable."""
    flat = np.concatenate([x.reshape(-1) for x in scores.values()])
    kept = ranks(flat, 0) < flat.size - pruned_count(flat.size, sparsity)
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, np.split(kept, ends), strict=True)}


def n_of_m(scores: np.ndarray, kept: int, group: int) -> np.ndarray:
    """Bool `[in, out]`: the best `kept` of each `group` consecutive inputs of an output, such as 2 of 4.

    Raises UserError unless `group` divides the inputs and `kept` is in 1..group.
    """
    check_n_of_m(len(scores), kept, group)
    groups = scores.reshape(-1, group, scores.shape[-1])
    return (ranks(groups, 1) < kept).reshape(scores.shape)


def check_n_of_m(inputs: int, kept: int, group: int) -> None:
    """Raises UserError unless `group` divides the inputs and `kept` is in 1..group."""
    if not 1 <= kept <= group:
        raise UserError(f"{kept}:{group} keeps {kept} of {group} entries: the first number must be in 1..{group}")
    if inputs % group:
        raise UserError(f"{kept}:{group} needs kernels whose inputs are divisible by {group}, and one has {inputs}")


def ranks(scores: Any, axis: int = 0) -> Any:
    """The place of each score along an axis, 0 for the highest; of equal ones the lower index comes first.

    The scores are an array of NumPy or of JAX, and so are their places. A NaN has no place: scores must be numbers.
    """
    xp = scores.__array_namespace__()
    return xp.argsort(xp.argsort(-scores, axis=axis, stable=True), axis=axis, stable=True)
