"""The sum of task vectors in which each entry has one sign: elect a sign, and let those that agree take part.

Yadav et al. 2023, arXiv:2306.01708. Its readings differ in who elects and in what divides, see `rules.ties`.
"""

from collections.abc import Sequence

import numpy as np

from lowrank.merging.blocks import blocks
from lowrank.merging.rule import Group, Option, choice, number, weights

ELECTIONS = ("weighted", "unweighted", "frequency")
DIVISORS = ("weight", "count", "none")
POSITIVE = choice("positive")  # for the rules that read no tensor before they merge
OPTIONS = {
    "election": Option(choice(*ELECTIONS), "weighted"),
    "divisor": Option(choice(*DIVISORS), "weight"),
    "zero_sign": Option(choice("positive", "majority"), "positive", whole=True),
    "lambda": Option(number, 1.0),
}
SPARSE = {**OPTIONS, "zero_sign": Option(POSITIVE, "positive")}  # of rules that drop entries of their own
UNDIVIDED = {**SPARSE, "divisor": Option(OPTIONS["divisor"].check, "none")}


def elect(rows: np.ndarray, w: np.ndarray, election: str) -> np.ndarray:
    """The sign `[n]` of the sum of the task vectors `rows` `[N, n]`: times their weights, as they are, or of signs."""
    if election == "frequency":
        rows = np.sign(rows)
    return np.sign((rows * w).sum(0) if election == "weighted" else rows.sum(0))


def disjoint_sum(group: Group) -> np.ndarray:
    """The base plus lambda times the merged task vectors, in the place of the base; `group.tensors` are these vectors.

    With `election: weighted`, weighted vectors agree with the elected sign, else the vectors themselves do. The
    divisor is the sum of the weights, or the number, of those that agree, where it is not zero.
    """
    assert group.base is not None
    shared, w = group.shared, np.array(weights(group.own))[:, None]
    zero = group.survey["sign"] if shared["zero_sign"] == "majority" else 1.0
    flat, out = [x.reshape(-1) for x in group.tensors], group.base.reshape(-1)
    for part in blocks(out.size):
        rows = np.stack([x[part] for x in flat]).astype(np.float64)
        sign = elect(rows, w, shared["election"])
        sign[sign == 0] = zero
        voters = rows * w if shared["election"] == "weighted" else rows
        agree = np.sign(voters) == sign
        total = (rows * w * agree).sum(0)
        if shared["divisor"] != "none":
            divisor = ((w if shared["divisor"] == "weight" else 1.0) * agree).sum(0)
            total /= np.where(divisor == 0, 1.0, divisor)
        out[part] = out[part] + shared["lambda"] * total
    return group.base


def weighted_sum(group: Group) -> np.ndarray:
    """The base plus lambda times the weighted sum of the vectors `group.tensors`, in the place of the base."""
    assert group.base is not None
    w, shared = weights(group.own), group.shared
    scale = shared["lambda"] / (sum(w) if shared["divisor"] == "weight" else 1.0)
    flat, out = [x.reshape(-1) for x in group.tensors], group.base.reshape(-1)
    for part in blocks(out.size):
        total = sum(wi * x[part].astype(np.float64) for wi, x in zip(w, flat, strict=True))
        out[part] = out[part] + scale * total
    return group.base


def record_kept(group: Group) -> None:
    """Notes the share of each task vector that is not zero."""
    group.kept = [float(np.count_nonzero(x)) / max(1, x.size) for x in group.tensors]


def sign_conflicts(tensors: Sequence[np.ndarray]) -> float:
    """The share of entries at which two vectors have opposite signs."""
    flat, conflicts = [x.reshape(-1) for x in tensors], 0
    for part in blocks(flat[0].size):
        rows = np.stack([x[part] for x in flat])
        conflicts += int(np.count_nonzero((rows > 0).any(0) & (rows < 0).any(0)))
    return conflicts / max(1, flat[0].size)
