"""A kernel as a product of two thin ones, `W ~ A B`, that loses as little as possible in a metric.

For a root S of a metric M, `S S^T = M`, the rank-r product that minimizes `tr(E^T M E)`, E the error, is `A = W V`,
`B = V^T`, with V the right singular vectors of `S^T W`. Nothing is inverted, so a singular metric needs no damping, and
what is lost is the sum of the squares of the other singular values. Kernels are `[in, out]`; all is in float64.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lowrank.core.errors import UserError, plural, unknown

Root = Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # (gram [in, in], mean of |x| [in], alpha) -> [in, in]


def plain(gram: np.ndarray, mean: np.ndarray, alpha: float) -> np.ndarray:
    """The identity: the singular value decomposition of the kernel alone."""
    del mean, alpha
    return np.eye(len(gram))


def asvd(gram: np.ndarray, mean: np.ndarray, alpha: float) -> np.ndarray:
    """The mean magnitude of each input to the power alpha (ASVD, arXiv:2312.05821)."""
    del gram
    return np.diag(np.float64(mean) ** alpha)


def svd_llm(gram: np.ndarray, mean: np.ndarray, alpha: float) -> np.ndarray:
    """A root of `X^T X`, with which the error is that of the outputs (SVD-LLM, arXiv:2403.07378)."""
    del mean, alpha
    values, vectors = np.linalg.eigh(np.float64(gram))
    return vectors * np.sqrt(np.maximum(values, 0))


METRICS: dict[str, Root] = {"svd": plain, "asvd": asvd, "svd_llm": svd_llm}


def fisher_root(mean_square: np.ndarray) -> np.ndarray:
    """The root of FWSVD's metric (arXiv:2207.00112): the squared gradients `[in, out]`, summed over the outputs."""
    return np.diag(np.sqrt(np.float64(mean_square).sum(axis=1)))


class Spectrum(NamedTuple):
    """A kernel's singular values in a metric, from the largest, and the directions that belong to them."""

    kernel: np.ndarray  # [in, out]
    values: np.ndarray  # [min(in, out)]
    directions: np.ndarray  # [out, min(in, out)]

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """`(A [in, rank], B [rank, out])`, whose columns and rows have a norm of the same size.

        Raises UserError for a rank that is not in 1..min(in, out).
        """
        if not 1 <= rank <= len(self.values):
            raise UserError(
                f"rank={rank} is not in 1..{len(self.values)} of a kernel {' x '.join(map(str, self.kernel.shape))}"
            )
        v = self.directions[:, :rank]
        a = self.kernel @ v
        size = np.sqrt(np.linalg.norm(a, axis=0))
        size = np.where(size > 0, size, 1.0)
        return a / size, size[:, None] * v.T

    def lost(self, rank: int) -> float:
        """The error `tr(E^T M E)` of this rank."""
        return float(np.sum(np.square(self.values[rank:])))


def spectrum(kernel: np.ndarray, root: np.ndarray) -> Spectrum:
    """The spectrum of a kernel in the metric `root @ root.T`."""
    wide = kernel.astype(np.float64)
    _, values, directions = np.linalg.svd(root.T @ wide, full_matrices=False)
    return Spectrum(wide, values, directions.T)


def metric(name: str) -> Root:
    """The function of `METRICS` that has this name. Raises UserError for an unknown one."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def even_rank(rows: int, columns: int) -> int:
    """The largest rank whose factors have fewer entries than the kernel; 0 if none has."""
    return (rows * columns - 1) // (rows + columns)


def rank_of_share(rows: int, columns: int, share: float) -> int:
    """The rank whose factors have this share of the kernel's entries. Raises UserError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"share={share} is not in (0, 1]")
    return int(share * rows * columns / (rows + columns))


def rank_of_energy(values: np.ndarray, energy: float) -> int:
    """The least rank that keeps this share of the sum of squares. Raises UserError for an energy outside (0, 1]."""
    if not 0 < energy <= 1:
        raise UserError(f"energy={energy} is not in (0, 1]")
    squares = np.square(values.astype(np.float64))
    kept = np.cumsum(squares) / max(squares.sum(), np.finfo(np.float64).tiny)
    return min(int(np.searchsorted(kept, energy * (1 - 1e-12))) + 1, len(values))


def ranks_by_loss(spectra: Mapping[str, Spectrum], share: float) -> dict[str, int]:
    """The ranks of several kernels whose factors have `share` of all entries: directions that lose most are kept.

    A direction costs `in + out` entries, and what is lost without it is its squared singular value, relative to the sum
    of its kernel's. Every kernel keeps one. Raises UserError for a share outside (0, 1], or too small for that.
    """
    if not 0 < share <= 1:
        raise UserError(f"share={share} is not in (0, 1]")
    budget = share * sum(s.kernel.size for s in spectra.values()) - sum(sum(s.kernel.shape) for s in spectra.values())
    if budget < 0:
        raise UserError(f"share={share} has no room for one direction of each of {plural(len(spectra), 'kernel')}")
    ranks = dict.fromkeys(spectra, 1)
    gains = [
        (float(square) / max(s.lost(0), math.ulp(0)) / sum(s.kernel.shape), name)
        for name, s in spectra.items()
        for square in np.square(s.values[1:])
    ]
    for _, name in sorted(gains, key=lambda gain: -gain[0]):
        cost = sum(spectra[name].kernel.shape)
        if cost <= budget:
            ranks[name], budget = ranks[name] + 1, budget - cost
    return ranks
