"""RegMean (Jin et al. 2023, arXiv:2212.09849): the kernel whose outputs are closest to those of all models.

W = (sum of G_i)^-1 (sum of G_i W_i), with the Gram matrix G_i `[in, in]` of the inputs that model i sees. Entries of G
off its diagonal are multiplied by `alpha`. Tensors without a Gram matrix are averaged.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from lowrank.merging.blocks import combine
from lowrank.merging.factors import Factors
from lowrank.merging.rule import Group, Option, Rule, Values, share


def shrink(gram: np.ndarray, alpha: float) -> np.ndarray:
    """`gram` in float64 with its entries off the diagonal multiplied by `alpha`."""
    gram = gram.astype(np.float64)
    return alpha * gram + np.diag((1 - alpha) * np.diag(gram))


def solve(system: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The solution of a positive semidefinite system; the one of least norm where it is singular."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", scipy.linalg.LinAlgWarning)  # it is close to a singular one
            return scipy.linalg.solve(system, right, assume_a="pos")
    except (np.linalg.LinAlgError, scipy.linalg.LinAlgWarning):
        return np.linalg.pinv(system, rcond=1e-12, hermitian=True) @ right


def mean_kernel(kernels: Sequence[np.ndarray], grams: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """The merged kernel `[in, out]` in float64. In directions that no input has, it is the mean of the kernels."""
    shrunk = [shrink(g, alpha) for g in grams]
    mean = np.mean(np.stack(kernels), axis=0, dtype=np.float64)
    right = sum(g @ (k - mean) for g, k in zip(shrunk, kernels, strict=True))
    return mean + solve(np.sum(shrunk, axis=0), np.asarray(right))


def _merge(group: Group) -> np.ndarray:
    if not all("gram" in s for s in group.statistics):
        return combine(group.tensors, [1 / len(group.tensors)] * len(group.tensors))
    flipped = group.input_axis == 1
    kernels = [x.T if flipped else x for x in group.tensors]
    merged = mean_kernel(kernels, [s["gram"] for s in group.statistics], group.shared["alpha"])
    return merged.T if flipped else merged


def merge_factors(shared: Values, grams: Sequence[np.ndarray], updates: Sequence[Factors | None]) -> Factors:
    """The merged update of adapters, whose rank is the sum of theirs; None stands for an update of zero.

    The base's kernel cancels, so that only the factors A are solved for.
    """
    shrunk = [shrink(g, shared["alpha"]) for g in grams]
    total, n = np.sum(shrunk, axis=0), len(grams)
    present = [(g, f) for g, f in zip(shrunk, updates, strict=True) if f is not None]
    right = np.concatenate([g @ f.a - total @ f.a / n for g, f in present], axis=1)
    mean = np.concatenate([f.a / n for _, f in present], axis=1)
    return Factors(mean + solve(total, right), np.concatenate([f.b for _, f in present], axis=0))


REGMEAN = Rule(
    merge=_merge,
    options={"alpha": Option(share, 0.9)},
    least=2,
    statistics="gram",
    merge_factors=merge_factors,
)
