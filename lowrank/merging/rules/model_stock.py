"""Model stock (Jang et al. 2024, arXiv:2403.19522): the mean of the models, drawn to the base by their angle.

With c the mean cosine of two task vectors, the mean has the share t = N c / (1 + (N - 1) c). A negative c extrapolates
away from the mean, as in mergekit; at the pole of t, the base is returned.
"""

import numpy as np

from lowrank.merging.blocks import combine, gram, subtract
from lowrank.merging.rule import Group, Option, Rule, flag


def mean_share(products: np.ndarray) -> float:
    """The share t of the mean, from the inner products `[N, N]` of the task vectors."""
    n, lengths = len(products), np.sqrt(np.diag(products))
    pairs = np.triu_indices(n, 1)
    cosines = products[pairs] / np.maximum(lengths[pairs[0]] * lengths[pairs[1]], 1e-6)
    c = float(np.clip(cosines, -1, 1).mean())
    divisor = 1 + (n - 1) * c
    return 0.0 if abs(divisor) < 1e-6 else n * c / divisor


def _merge(group: Group) -> np.ndarray:
    base = group.base
    assert base is not None
    subtract(group.tensors, base)
    rows = len(base) if group.shared["filter_wise"] and base.ndim > 1 else 1
    n = len(group.tensors)
    views = [x.reshape(rows, -1) for x in (base, *group.tensors)]
    for row in range(rows):
        vectors = [x[row] for x in views]
        t = mean_share(gram(vectors[1:]))
        combine(vectors, [1.0] + [t / n] * n)
    return base


MODEL_STOCK = Rule(merge=_merge, options={"filter_wise": Option(flag, False)}, base=True, least=2)
