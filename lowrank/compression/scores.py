"""Scores of a kernel's entries `[in, out]`: the higher, the more would be lost without the entry.

Some need the inputs of the kernel, with `gram = X^T X` `[in, in]` over real tokens, and some gradients of a loss.
"""

from collections.abc import Callable

import numpy as np

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (kernel [in, out], gram [in, in]) -> [in, out]


def magnitude(kernel: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """`|w|` (Han et al. 2015, arXiv:1506.02626)."""
    del gram
    return np.abs(kernel.astype(np.float64))


def wanda(kernel: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """`|w|` times the norm of its input over all tokens (Sun et al. 2023, arXiv:2306.11695)."""
    return np.abs(kernel.astype(np.float64)) * np.sqrt(np.diag(gram))[:, None]


SCORES: dict[str, Score] = {"magnitude": magnitude, "wanda": wanda}


def first_order(kernel: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """`|w g|` for the gradient summed over all examples, of SNIP (Lee et al. 2019, arXiv:1810.02340)."""
    return np.abs(kernel.astype(np.float64) * gradient)


def second_order(kernel: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """`w^2 E[g^2] / 2`, with the Fisher information's diagonal in place of the Hessian's (optimal brain damage)."""
    return 0.5 * np.square(kernel.astype(np.float64)) * mean_square


def movement(products: np.ndarray) -> np.ndarray:
    """Minus the sum of `w g` over the steps of training, signed: entries that grow are kept (arXiv:2005.07683)."""
    return -products.astype(np.float64)
