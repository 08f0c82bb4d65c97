"""Optimal transport of units (Singh and Jaggi 2020, arXiv:1910.05653): each unit becomes a mixture of another model's.

A plan T `[n, m]` moves mass 1/m of each of the m units to n places of mass 1/n each. What a place reads is the mean of
its units, n T X; what it writes is m T Y, so that nothing that the units write is lost: a unit that is split in two
writes half from each. For equal widths n T is a permutation, as of weight matching; `regularization` softens it.
"""

import numpy as np
import scipy.optimize
import scipy.sparse

from lowrank.core.errors import UserError
from lowrank.merging.alignment.matching import Layer, assign, products

LARGEST = 1 << 18  # entries of a plan of unequal widths that a linear program is solved for
ROUNDS, TOLERANCE = 2000, 1e-10


def transport_plan(cost: np.ndarray, regularization: float = 0.0) -> np.ndarray:
    """The plan T `[n, m]` of least `sum(T * cost)`, float64, with row sums 1/n and column sums 1/m.

    With `regularization`, in units of the mean cost, less that much of its entropy (Cuturi 2013, arXiv:1306.0895).
    Raises UserError for unequal widths that are too large without it.
    """
    n, m = cost.shape
    if regularization:
        return _sinkhorn(cost / max(float(cost.mean()), 1e-300) / regularization)
    if n == m:
        plan = np.zeros((n, n))
        plan[np.arange(n), assign(-cost)] = 1 / n
        return plan
    if n * m > LARGEST:
        raise UserError(f"align: an exact transport of {m} to {n} units is too large: give a regularization")
    rows = scipy.sparse.kron(scipy.sparse.eye(n), np.ones((1, m)))
    columns = scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye(m))
    sums = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    found = scipy.optimize.linprog(cost.ravel(), A_eq=scipy.sparse.vstack([rows, columns]), b_eq=sums)
    return np.maximum(found.x, 0).reshape(n, m)


def _sinkhorn(cost: np.ndarray) -> np.ndarray:
    """The plan by turns of rescaling rows and columns, in logarithms; the row sums are exact."""
    n, m = cost.shape
    potential = np.zeros(m)
    for _ in range(ROUNDS):
        shifted = potential - cost
        rows = -np.log(n) - _log_sum(shifted, 1)
        shifted = rows[:, None] - cost
        last, potential = potential, -np.log(m) - _log_sum(shifted, 0)
        if np.abs(potential - last).max() < TOLERANCE:
            break
    shifted = potential - cost
    return np.exp(shifted - np.log(n) - _log_sum(shifted, 1)[:, None])


def _log_sum(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis)
    return top + np.log(np.exp(x - np.expand_dims(top, axis)).sum(axis))


def match_units(reference: Layer, model: Layer, regularization: float) -> tuple[np.ndarray, np.ndarray]:
    """`(n T, m T)` `[n, m]`: what makes the model's units into the reference's places, for reading and for writing."""
    cost = np.zeros((len(reference["read"]), len(model["read"])))
    for name in ("read", "write"):
        a, b = reference[name].reshape(len(reference[name]), -1), model[name].reshape(len(model[name]), -1)
        cost += np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * products(a, b)
    plan = transport_plan(np.maximum(cost, 0), regularization)
    return plan * cost.shape[0], plan * cost.shape[1]
