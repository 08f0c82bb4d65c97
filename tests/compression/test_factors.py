"""Kernels as two factors: the worked numbers of every metric, singular metrics, and ranks by budget and by energy."""

import numpy as np
import pytest

from lowrank.compression import factors
from lowrank.core.errors import UserError
from tests.support.close import assert_close
from tests.support.worked_kernel import GRAM, X

KERNEL = np.array([[2, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, -1]], np.float64)
MEAN = np.abs(X).mean(0)
LOST = {"svd": (43.722698, 11.791164), "asvd": (41.907821, 9.992662), "svd_llm": (39.915126, 8.272819)}


def made(name, gram=GRAM):
    return factors.spectrum(KERNEL, factors.metric(name)(gram, MEAN, 0.5))


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_error_of_the_outputs_is_that_of_the_worked_kernel(name, rank):
    a, b = made(name).factors(rank)
    assert (a.shape, b.shape) == ((4, rank), (rank, 3))
    assert_close(np.sum(np.square(X @ (KERNEL - a @ b))), LOST[name][rank - 1])
    assert_close(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1))


def test_the_metric_of_the_inputs_says_what_is_lost():
    found = made("svd_llm")
    assert_close(np.square(found.values), [49.084874, 31.642307, 8.272819])
    assert_close([found.lost(1), found.lost(2), found.lost(3)], [39.915126, 8.272819, 0])


def test_a_singular_metric_needs_no_damping():
    x = X[:2]  # two tokens of four inputs
    found = made("svd_llm", x.T @ x)
    a, b = found.factors(2)
    assert_close(x @ a @ b, x @ KERNEL)
    assert_close(found.lost(2), 0, size=1.0)


def test_gradients_weigh_the_inputs():
    square = np.arange(12.0).reshape(4, 3)
    root = factors.fisher_root(square)
    assert_close(root @ root.T, np.diag(square.sum(1)))
    a, b = factors.spectrum(KERNEL, root).factors(3)
    assert_close(a @ b, KERNEL)


def test_ranks_are_those_of_the_worked_shapes():
    shapes = {(576, 576): (288, 230), (576, 192): (144, 115), (576, 1536): (418, 335)}
    for (rows, columns), (even, share) in shapes.items():
        saves = factors.even_rank(rows, columns)
        assert saves * (rows + columns) < rows * columns <= (saves + 1) * (rows + columns)
        assert saves in (even - 1, even)
        assert factors.rank_of_share(rows, columns, 0.8) == share
    energies = [factors.rank_of_energy(np.array([2.0, 1, 1]), energy) for energy in (4 / 6, 0.7, 1.0)]
    assert energies == [1, 2, 3]


def test_ranks_go_to_the_kernels_that_lose_most():
    rng = np.random.default_rng(0)
    flat, steep = (rng.normal(size=(16, 12)) @ np.diag(values) for values in (np.ones(12), 0.1 ** np.arange(12)))
    spectra = {name: factors.spectrum(w, np.eye(16)) for name, w in (("flat", flat), ("steep", steep))}
    ranks = factors.ranks_by_loss(spectra, 0.5)
    assert ranks["flat"] > ranks["steep"] == 1
    assert sum(ranks.values()) * (16 + 12) <= 0.5 * 2 * 16 * 12


BAD = {
    "rank": (lambda: made("svd").factors(4), r"rank=4 is not in 1\.\.3 of a kernel 4 x 3"),
    "metric": (lambda: factors.metric("svdllm"), r"unknown metric 'svdllm' .did you mean 'svd_llm'"),
    "share": (lambda: factors.rank_of_share(4, 4, 0.0), r"share=0.0 is not in \(0, 1\]"),
    "energy": (lambda: factors.rank_of_energy(np.ones(2), 2.0), r"energy=2.0 is not in \(0, 1\]"),
    "room": (lambda: factors.ranks_by_loss({"a": made("svd")}, 0.1), "no room for one direction of each of 1 kernel"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_met_is_refused(case):
    call, text = BAD[case]
    with pytest.raises(UserError, match=text):
        call()
