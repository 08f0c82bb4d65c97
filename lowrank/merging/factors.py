"""Updates of low rank, `A @ B` with A `[in, r]` and B `[r, out]`: their sums, and the best one of a smaller rank."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Factors(NamedTuple):
    """The update `a @ b` of a kernel `[in, out]`, in float64."""

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a.shape[1]


def concatenate(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """The sum of `c * a @ b`, exactly, with the sum of the ranks; terms whose coefficient is zero are left out."""
    present = [(c, f) for c, f in terms if c] or [(0.0, terms[0][1])]
    a = np.concatenate([f.a for _, f in present], axis=1)
    return Factors(a, np.concatenate([c * f.b for c, f in present], axis=0))


def recompress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """`(the closest update of at most this rank, its relative error)`, in the Frobenius norm.

    QR of both factors and the SVD of a small core: no array of the kernel's shape is made.
    """
    q_a, r_a = np.linalg.qr(factors.a)
    q_b, r_b = np.linalg.qr(factors.b.T)
    u, s, v = np.linalg.svd(r_a @ r_b.T)
    return _cut(q_a @ u[:, : len(s)], s, v[: len(s)] @ q_b.T, rank)


def truncate(delta: np.ndarray, rank: int) -> tuple[Factors, float]:
    """`recompress` of a dense update `[in, out]`."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return _cut(u, s, v, rank)


def _cut(u: np.ndarray, s: np.ndarray, v: np.ndarray, rank: int) -> tuple[Factors, float]:
    """The first ranks, with the square root of each singular value on both sides."""
    size = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / size if size else 0.0
    root = np.sqrt(s[:rank])
    return Factors(u[:, :rank] * root, root[:, None] * v[:rank]), error
