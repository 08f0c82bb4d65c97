"""Sums over large arrays in float64, one block at a time, so that no further array of their size is made."""

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 1 << 14  # entries; a few blocks of float64 stay in the cache


def blocks(size: int) -> Iterator[slice]:
    """The slices of a flat array of `size` entries."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def products(rows: np.ndarray) -> np.ndarray:
    """`rows @ rows.T` without BLAS, whose threads wait for each other for most of the time in products this small."""
    return np.einsum("in,jn->ij", rows, rows)


def gram(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inner products `[N, N]` of the flattened arrays, in float64."""
    flat = [x.reshape(-1) for x in arrays]
    total = np.zeros((len(flat), len(flat)))
    for part in blocks(flat[0].size):
        rows = np.stack([x[part] for x in flat]).astype(np.float64)
        total += products(rows)
    return total


def combine(arrays: Sequence[np.ndarray], coefficients: Sequence[float]) -> np.ndarray:
    """The sum of `coefficients[i] * arrays[i]`, in the place of `arrays[0]`."""
    flat = [x.reshape(-1) for x in arrays]
    for part in blocks(flat[0].size):
        total = coefficients[0] * flat[0][part].astype(np.float64)
        for x, c in zip(flat[1:], coefficients[1:], strict=True):
            if c:
                total += c * x[part].astype(np.float64)
        flat[0][part] = total
    return arrays[0]


def subtract(arrays: Sequence[np.ndarray], base: np.ndarray | None) -> None:
    """Turns each array into its difference from `base`, in place. A rule on task vectors has a base."""
    assert base is not None
    for x in arrays:
        np.subtract(x, base, out=x)
