"""Federated averaging of one kernel: what a server makes of its clients' models after a round.

With n_k samples of client k and n of all, the mean is W = sum of (n_k / n) W_k (FedAvg, McMahan et al. 2017,
arXiv:1602.05629). Of adapters, the mean of A times the mean of B is not the mean of A B: the difference is the gap,
which the rules of `AGGREGATIONS` treat in their own ways. No array of the kernel's size is made.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lowrank.core.errors import UserError, plural
from lowrank.merging.factors import Factors, concatenate


@dataclasses.dataclass(frozen=True)
class Round:
    """What clients start the next round from: the change of the base, and factors; None stands for new ones."""

    base_change: Factors | None
    factors: Factors | None


Aggregate = Callable[[Sequence[Factors], Sequence[float]], Round]  # (factors of the clients, their weights) -> round


def sample_weights(samples: Sequence[int]) -> list[float]:
    """The share of all samples that each client has. Raises UserError without clients, and for a count below 1."""
    if not samples:
        raise UserError("a round needs at least one client")
    for k, count in enumerate(samples):
        if count < 1:
            raise UserError(f"client {k} has {plural(count, 'sample')}: leave it out of the round")
    return [count / sum(samples) for count in samples]


def average(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted mean in float64: FedAvg of one tensor."""
    return np.asarray(sum(w * np.asarray(x, np.float64) for w, x in zip(weights, arrays, strict=True)))


def mean_update(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The mean of the clients' updates A B, exactly, with the sum of their ranks."""
    return concatenate(list(zip(weights, clients, strict=True)))


def mean_factors(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The mean of A and that of B. Raises UserError for clients of different ranks, whose factors have no mean."""
    if len(ranks := sorted({client.rank for client in clients})) > 1:
        raise UserError(f"the clients have the ranks {', '.join(map(str, ranks))}: only flora takes different ranks")
    return Factors(average([c.a for c in clients], weights), average([c.b for c in clients], weights))


def gap(clients: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The mean of A B minus the mean of A times the mean of B."""
    mean = mean_factors(clients, weights)
    return concatenate([(1.0, mean_update(clients, weights)), (-1.0, mean)])


def norm(update: Factors) -> float:
    """The Frobenius norm of A B, from the triangles of two QR decompositions."""
    r_a, r_b = (np.linalg.qr(x).R for x in (update.a, update.b.T))
    return float(np.linalg.norm(r_a @ r_b.T))


def fedit(clients: Sequence[Factors], weights: Sequence[float]) -> Round:
    """FedIT (Zhang et al. 2024, arXiv:2305.05644): A and B are averaged apart, and the gap is lost."""
    return Round(None, mean_factors(clients, weights))


def ffa_lora(clients: Sequence[Factors], weights: Sequence[float]) -> Round:
    """FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): all clients keep one A and train B, so that there is no gap.

    Raises UserError for clients that differ in A.
    """
    if any(not np.array_equal(client.a, clients[0].a) for client in clients[1:]):
        raise UserError("the clients differ in A, which ffa_lora keeps frozen: train B alone")
    return Round(None, Factors(clients[0].a, average([c.b for c in clients], weights)))


def flora(clients: Sequence[Factors], weights: Sequence[float]) -> Round:
    """FLoRA (Wang et al. 2024, arXiv:2409.05976): the stacked factors are merged into the base, and new ones follow.

    The ranks may differ.
    """
    return Round(mean_update(clients, weights), None)


def fedex(clients: Sequence[Factors], weights: Sequence[float]) -> Round:
    """FedEx-LoRA (Singhal et al. 2025, arXiv:2410.09432): A and B are averaged apart, and the base takes the gap."""
    return Round(gap(clients, weights), mean_factors(clients, weights))


AGGREGATIONS: dict[str, Aggregate] = {"fedit": fedit, "ffa_lora": ffa_lora, "flora": flora, "fedex": fedex}
