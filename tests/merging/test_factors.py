"""Updates of low rank: their exact sum, and the best one of a smaller rank."""

import numpy as np

from lowrank.merging.factors import Factors, concatenate, recompress, truncate
from tests.support.close import assert_close

ONE = Factors(np.array([[1.0], [0], [-1]]), np.array([[0.5, -1]]))
TWO = Factors(np.array([[0.0, 1], [1, 0], [1, 1]]), np.array([[1.0, 0], [0, 2]]))
SCALES = 0.6 * 2, -0.4 / np.sqrt(2)  # weight times alpha / r, and alpha / sqrt(r)
SUM = np.array([[0.6, -1.765685], [-0.282843, 0], [-0.882843, 0.634315]])


def test_worked_numbers():
    total = concatenate([(SCALES[0], ONE), (SCALES[1], TWO)])
    assert total.rank == 3
    assert_close(total.a @ total.b, SUM, relative=2e-6)
    assert_close(np.linalg.svd(total.a @ total.b)[1], np.array([2.087122, 0.619140]), relative=2e-6)
    small, error = recompress(total, 1)
    assert_close(error, 0.284398, relative=1e-5)
    assert_close(np.linalg.norm(small.a @ small.b - SUM) / np.linalg.norm(SUM), error, relative=1e-5)


def test_recompression_is_the_truncated_svd_and_exact_at_the_full_rank():
    rng = np.random.default_rng(0)
    total = Factors(rng.standard_normal((20, 9)), rng.standard_normal((9, 15)))
    dense = total.a @ total.b
    for rank in (1, 4, 8):
        small, error = recompress(total, rank)
        other, same = truncate(dense, rank)
        assert small.rank == rank
        assert_close(small.a @ small.b, other.a @ other.b, relative=1e-9)
        assert_close(error, same, relative=1e-9)
    exact, error = recompress(total, 9)
    assert_close(exact.a @ exact.b, dense, relative=1e-9)
    assert error == 0


def test_a_rank_beyond_the_kernel():
    rng = np.random.default_rng(0)
    wide = Factors(rng.standard_normal((3, 7)), rng.standard_normal((7, 4)))
    small, error = recompress(wide, 3)
    assert_close(small.a @ small.b, wide.a @ wide.b, relative=1e-9)
    assert error < 1e-12


def test_subtracting_an_adapter_leaves_nothing():
    assert not np.any(concatenate([(0.0, ONE)]).b)
    total = concatenate([(1.0, TWO), (-1.0, TWO)])
    small, _ = recompress(total, 1)
    assert_close(small.a @ small.b, np.zeros((3, 2)), relative=1e-12, size=1)
