"""The measures of LoRA's section 7: how much two subspaces share, and how much an update amplifies.

Kernels are `[in, out]`, so that A is `[in, r]`, and the input side of an update `A @ B` is its left singular vectors.
All is computed in float64.
"""

from typing import NamedTuple

import numpy as np


def input_directions(matrix: np.ndarray) -> np.ndarray:
    """The left singular vectors `[in, min(in, out)]` of a matrix `[in, out]`, the largest singular value first."""
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)[0]


def phi(first: np.ndarray, second: np.ndarray, i: int, j: int) -> float:
    """`|U1_i^T U2_j|_F^2 / min(i, j)` for the first i and j columns of two bases, from 0 (orthogonal) to 1 (contained).

    Two random subspaces of R^d share max(i, j) / d on average.
    """
    overlap = first[:, :i].T @ second[:, :j]
    return float(np.sum(overlap**2) / min(i, j))


class Amplification(NamedTuple):
    """Table 7 for one kernel: Frobenius norms of W and dW, and of W in r directions of dW, of W and of chance."""

    weight: float
    update: float
    by_update: float
    by_weight: float
    by_chance: float

    @property
    def factor(self) -> float:
        """How much more the update has in its own directions than the weight."""
        return self.update / self.by_update


def amplification(weight: np.ndarray, update: np.ndarray, rank: int, rng: np.random.Generator) -> Amplification:
    """The norms of `weight` and `update` `[in, out]`, with the first `rank` singular directions of each side."""
    weight, update = weight.astype(np.float64), update.astype(np.float64)
    chance = rng.standard_normal(weight.shape)
    projected = [_projected(weight, _directions(each, rank)) for each in (update, weight, chance)]
    return Amplification(float(np.linalg.norm(weight)), float(np.linalg.norm(update)), *projected)


def _directions(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], v[:rank].T


def _projected(weight: np.ndarray, directions: tuple[np.ndarray, np.ndarray]) -> float:
    u, v = directions
    return float(np.linalg.norm(u.T @ weight @ v))
