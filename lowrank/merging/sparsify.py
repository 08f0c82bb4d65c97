"""Sparse task vectors: entries are dropped by their magnitude or by chance, and the others may be rescaled.

Every function changes its array in place.
"""

import zlib
from collections.abc import Iterator

import numpy as np

from lowrank.merging.blocks import BLOCK, blocks

EPSILON = 1e-7  # a norm below it is not rescaled, as in mergekit


def largest(x: np.ndarray, count: int) -> np.ndarray:
    """A mask of the `count` entries of largest magnitude; of equal ones, the first are taken."""
    flat = np.abs(x).reshape(-1)
    mask = np.zeros(flat.shape, bool)
    if count <= 0:
        return mask.reshape(x.shape)
    if count >= flat.size:
        return ~mask.reshape(x.shape)
    flat.partition(flat.size - count)
    threshold = flat[flat.size - count]
    del flat
    original = x.reshape(-1)
    for part in blocks(mask.size):
        mask[part] = np.abs(original[part]) > threshold
    left = count - int(mask.sum())
    for part in blocks(mask.size):
        if not left:
            break
        equal = np.flatnonzero(np.abs(original[part]) == threshold)[:left]
        mask[part][equal] = True
        left -= len(equal)
    return mask.reshape(x.shape)


def trim(x: np.ndarray, density: float) -> None:
    """Keeps the `int(density * n)` entries of largest magnitude, at least one; ties as in `largest`."""
    if density < 1:
        x *= largest(x, max(1, int(density * x.size)))


def trim_below(x: np.ndarray, threshold: float) -> None:
    """Keeps the entries whose magnitude, rounded to float32, is at least `threshold`."""
    flat = x.reshape(-1)
    for part in blocks(flat.size):
        flat[part] *= np.abs(flat[part].astype(np.float32)) >= np.float32(threshold)


def trim_both_ends(x: np.ndarray, density: float, gamma: float) -> None:
    """Drops the `int(gamma * n)` entries of largest magnitude, then the smallest until `int(density * n)` are left.

    Fewer of the largest are dropped where too few entries would be left, as in mergekit 0.1.5.
    """
    if density >= 1:
        return
    kept, outliers = int(density * x.size), int(gamma * x.size)
    smallest = max(0, x.size - kept - outliers)
    mask = largest(x, x.size - smallest)
    mask &= ~largest(x, x.size - smallest - kept)
    x *= mask


def drop(x: np.ndarray, density: float, rescale: str, numbers: np.random.Generator) -> None:
    """Keeps each entry with probability `density`."""
    if density >= 1:
        return
    before = _size(x, rescale)
    flat = x.reshape(-1)
    for part in blocks(flat.size):
        flat[part] *= numbers.random(part.stop - part.start) < density
    _restore(x, rescale, before, density)


def drop_by_rank(x: np.ndarray, density: float, epsilon: float, rescale: str, numbers: np.random.Generator) -> None:
    """Keeps each entry with a probability that rises with its rank in its row, `density - epsilon ... + epsilon`.

    Deep et al. 2024, arXiv:2406.11617, whose survivors are each divided by their own probability (`rescale: inverse`).
    """
    if density >= 1:
        return
    before = _size(x, rescale)
    for rows in _rows(x):
        p = keep_probabilities(rows, density, epsilon)
        rows *= numbers.random(rows.shape) < p
        if rescale == "inverse":
            rows /= p
    _restore(x, rescale, before, 1.0)


def keep_probabilities(rows: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """The probability `[rows, n]` with which `drop_by_rank` keeps each entry; a row of one entry has `density`."""
    n = rows.shape[1]
    ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
    return density - epsilon + 2 * epsilon * ranks / (n - 1) if n > 1 else np.full(rows.shape, density)


def generator(seed: int, model: int, name: str) -> np.random.Generator:
    """The numbers of one tensor of one model, which depend on no other tensor and on no order."""
    return np.random.default_rng([seed, model, zlib.crc32(name.encode())])


def _rows(x: np.ndarray) -> Iterator[np.ndarray]:
    matrix = x.reshape(1, -1) if x.ndim < 2 else x.reshape(-1, x.shape[-1])
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield matrix[start : start + step]


def _size(x: np.ndarray, rescale: str) -> float:
    """The sum of the magnitudes, where it is needed."""
    flat = x.reshape(-1)
    return sum(float(np.abs(flat[p].astype(np.float64)).sum()) for p in blocks(flat.size)) if rescale == "l1" else 0.0


def _restore(x: np.ndarray, rescale: str, before: float, density: float) -> None:
    after = _size(x, rescale)
    if rescale == "inverse" and density < 1:
        x /= np.asarray(density, x.dtype)
    if rescale == "l1" and before >= EPSILON and after >= EPSILON:
        x *= np.asarray(before / after, x.dtype)
