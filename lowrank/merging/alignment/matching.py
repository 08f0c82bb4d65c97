"""Weight matching (Ainsworth et al. 2023, arXiv:2209.04836): the permutations of a layer that make two models closest.

Shapes: D width, F units of an MLP, K groups of heads with one key and value, G query heads in a group, d their size.
A permutation is an array p: what is at place i comes from the place p[i] of the model that is aligned. Biases are one
more column of what a unit or head reads.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import scipy.optimize

ROUNDS = 100
GAIN = 1e-12  # relative; a smaller one ends the descent, and does not undo the identity
Layer = Mapping[str, np.ndarray]  # q [K, G, d, D], k and v [K, d, D], o [K, G, d, D]; units read [F, ...], write [F, D]


class HeadOrder(NamedTuple):
    """The order of a layer's groups `[K]`, of the heads `[K, G]` and of both kinds of dimensions `[K, d]` in each."""

    groups: np.ndarray
    heads: np.ndarray
    values: np.ndarray
    keys: np.ndarray


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation p with the largest sum of `gain[i, p[i]]`; the identity where none is better."""
    order = np.arange(len(gain))
    _, best = scipy.optimize.linear_sum_assignment(gain, maximize=True)
    plain, found = float(gain[order, order].sum()), float(gain[order, best].sum())
    return best if found - plain > GAIN * max(1.0, abs(plain)) else order


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The inner products `[n, m]` of what two arrays hold at each place of their first axis."""
    return a.reshape(len(a), -1) @ b.reshape(len(b), -1).T


def match_units(reference: Layer, model: Layer) -> np.ndarray:
    """The order of the model's MLP units."""
    return assign(products(reference["read"], model["read"]) + products(reference["write"], model["write"]))


def match_heads(reference: Layer, model: Layer, free_keys: bool) -> HeadOrder:
    """The order of the model's groups, of the heads in each, and of the dimensions of values.

    `free_keys`: the dimensions of queries and keys may be permuted too, as no rope tells them apart. Every pair of
    groups is matched inside, by turns, and then the groups are assigned to each other.
    """
    K, G, d, _ = reference["q"].shape
    gain, inner = np.zeros((K, K)), {}
    for i in range(K):
        for j in range(K):
            ours, theirs = ({name: x[at] for name, x in layer.items()} for layer, at in ((reference, i), (model, j)))
            gain[i, j], inner[i, j] = _match_pair(ours, theirs, free_keys)
    groups = assign(gain)
    parts = [inner[i, j] for i, j in enumerate(groups)]
    heads, values, keys = (np.array([part[n] for part in parts]) for n in range(3))
    return HeadOrder(groups, heads.reshape(K, G), values.reshape(K, d), keys.reshape(K, d))


def _match_pair(ours: Layer, theirs: Layer, free_keys: bool) -> tuple[float, tuple[np.ndarray, ...]]:
    """`(sum of inner products, (order of heads, of value dimensions, of key dimensions))` of two groups."""
    q, o = theirs["q"], theirs["o"]
    heads, values, keys = np.arange(len(q)), np.arange(q.shape[1]), np.arange(q.shape[1])
    last, started = -np.inf, False
    for _ in range(ROUNDS):
        by_query = products(ours["q"], q[:, keys])
        heads = assign(by_query + products(ours["o"], o[:, values]) if started else by_query)
        started = True
        gain = products(ours["v"], theirs["v"]) + _over_heads(products, ours["o"], o[heads])
        values = assign(gain)
        total = float(gain[np.arange(len(values)), values].sum())
        key_gain = products(ours["k"], theirs["k"]) + _over_heads(products, ours["q"], q[heads])
        keys = assign(key_gain) if free_keys else keys
        total += float(key_gain[np.arange(len(keys)), keys].sum())
        if total - last <= GAIN * max(1.0, abs(total)):
            break
        last = total
    return total, (heads, values, keys)


def _over_heads(function: Callable[[np.ndarray, np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum([function(x, y) for x, y in zip(a, b, strict=True)], axis=0)
