"""Rounds of federated averaging against worked numbers and float64 products."""

import numpy as np
import pytest

from lowrank.core.errors import UserError
from lowrank.merging import federated
from lowrank.merging.factors import Factors
from tests.support.close import assert_close

ONE = Factors(np.array([[0.0, 1], [1, 0], [1, 1]]), np.array([[1.0, 0], [0, 2]]))
OTHER = Factors(np.array([[1.0, 0], [0, 1], [1, -1]]), np.array([[0.0, 1], [1, 1]]))
SHARES = [0.75, 0.25]
EXACT = np.array([[0, 1.75], [1, 0.25], [0.5, 1.5]])
NAIVE = np.array([[0.375, 1.375], [0.625, 0.625], [0.875, 1.125]])


def total(result, start):
    """What the next round's models compute, as an update of the base before it."""
    parts = [f.a @ f.b for f in (result.base_change, result.factors) if f is not None]
    return sum(parts, start)


def drawn(count=3, rank=2, same_a=False):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((count, 6, rank))
    return [Factors(a[0 if same_a else i], rng.standard_normal((rank, 5))) for i in range(count)]


def test_the_worked_numbers():
    clients = [ONE, OTHER]
    assert federated.sample_weights([30, 10]) == SHARES
    assert_close(federated.average([c.a @ c.b for c in clients], SHARES), EXACT)
    naive = federated.fedit(clients, SHARES).factors
    assert_close(naive.a @ naive.b, NAIVE)
    gap = federated.gap(clients, SHARES)
    assert_close(gap.a @ gap.b, EXACT - NAIVE)
    product = SHARES[0] * SHARES[1] * (ONE.a - OTHER.a) @ (ONE.b - OTHER.b)
    assert_close(gap.a @ gap.b, product)
    assert_close(federated.norm(gap), np.linalg.norm(EXACT - NAIVE))


@pytest.mark.parametrize("name", federated.AGGREGATIONS)
def test_every_rule_but_fedit_is_the_mean_of_the_updates(name):
    clients, weights = drawn(same_a=name == "ffa_lora"), federated.sample_weights([5, 3, 2])
    result = federated.AGGREGATIONS[name](clients, weights)
    exact = sum(w * c.a @ c.b for w, c in zip(weights, clients, strict=True))
    error = np.linalg.norm(total(result, np.zeros_like(exact)) - exact) / np.linalg.norm(exact)
    assert (error < 1e-12) == (name != "fedit")


def test_clients_that_agree_leave_no_gap_and_ranks_may_differ_where_they_are_stacked():
    assert federated.norm(federated.gap([ONE, ONE], SHARES)) < 1e-12
    unlike = [ONE, drawn(1, rank=3)[0]]
    unlike[1] = Factors(unlike[1].a[:3], unlike[1].b[:, :2])
    assert federated.flora(unlike, SHARES).base_change.rank == 5
    for name in ("fedit", "fedex"):
        with pytest.raises(UserError, match="the clients have the ranks 2, 3: only flora takes different ranks"):
            federated.AGGREGATIONS[name](unlike, SHARES)


def test_bad_rounds_are_refused():
    with pytest.raises(UserError, match="needs at least one client"):
        federated.sample_weights([])
    with pytest.raises(UserError, match="client 1 has 0 samples"):
        federated.sample_weights([3, 0])
    with pytest.raises(UserError, match="differ in A, which ffa_lora keeps frozen"):
        federated.ffa_lora([ONE, OTHER], SHARES)
