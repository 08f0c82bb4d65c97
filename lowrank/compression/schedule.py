"""How sparse a model is at each step, and how sparse each layer is."""

from collections.abc import Mapping

import numpy as np

from lowrank.compression.masks import check_sparsity
from lowrank.core.errors import UserError


def cubic_sparsity(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """The sparsity at a step: `initial` until `begin`, `final` from `end`, fast at first (arXiv:1710.01878, eq. 1).

    Raises UserError for an end that is not after the begin, and sparsities that are not in [0, 1].
    """
    check_sparsity(initial)
    check_sparsity(final)
    if end <= begin:
        raise UserError(f"end={end} is not after begin={begin}")
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1 - done) ** 3


def outlier_share(scores: np.ndarray, multiple: float) -> float:
    """The share of a layer's scores that exceed `multiple` times their mean."""
    return float(np.mean(scores > multiple * np.mean(scores)))


def layer_sparsities(shares: Mapping[str, float], sparsity: float, spread: float = 0.08) -> dict[str, float]:
    """The sparsity of each layer by OWL (arXiv:2310.05175): layers with more outliers are pruned less.

    `shares` are those of `outlier_share`. The sparsities lie within `2 * spread` of each other, and their mean is
    `sparsity`; equal shares give all layers this sparsity. Raises UserError for a spread that leaves [0, 1].
    """
    check_sparsity(sparsity)
    found = np.array(list(shares.values()), np.float64)
    width = np.ptp(found)
    above = 2 * spread * (found - found.min()) / width if width > 0 else np.zeros_like(found)
    layers = sparsity - (above - above.mean())
    if layers.min() < 0 or layers.max() > 1:
        raise UserError(f"spread={spread} gives layers a sparsity that is not in [0, 1]: lower it")
    return dict(zip(shares, layers.tolist(), strict=True))
