"""Intervals, paired differences and Holm's correction, beside SciPy and the printed tables of Student's t."""

import math

import numpy as np
import pytest
from scipy import stats

from lowrank.sweeps.statistics import holm, interval, is_tied, paired_difference, sign_test
from tests.support.close import assert_close

# Student's t, two-sided 95 %, as printed in tables, by degrees of freedom.
PRINTED = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042}


@pytest.mark.parametrize("freedom", PRINTED)
def test_the_interval_is_students(freedom):
    values = list(np.random.default_rng(freedom).normal(size=freedom + 1))
    half = PRINTED[freedom] * np.std(values, ddof=1) / math.sqrt(freedom + 1)
    assert_close(interval(values), half, relative=3e-4)


def test_without_a_second_value_there_is_no_interval():
    assert math.isnan(interval([1.0]))
    assert math.isnan(interval([]))


def test_differences_are_taken_in_pairs_of_one_key():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    found = paired_difference(dict(enumerate(a)) | {99: 1e6}, dict(enumerate(b)) | {-1: 1e6})
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert found.pairs == 6
    assert_close(found.p, expected.pvalue, relative=1e-9)
    assert_close([found.mean - found.half, found.mean + found.half], [low, high], relative=1e-9)


@pytest.mark.parametrize(("a", "b"), [({}, {0: 1.0}), ({0: 1.0}, {0: 2.0}), ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0})])
def test_no_pair_one_pair_and_pairs_without_noise_have_no_p_value_and_are_ties(a, b):
    assert math.isnan(paired_difference(a, b).p)
    assert is_tied(paired_difference(a, b).p)


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left():
    assert_close(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], relative=1e-12)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([math.nan, 0.02, 0.01])
    assert math.isnan(found[0])
    assert_close(found[1:], [0.02, 0.02], relative=1e-12)
    assert not is_tied(0.05)
    assert is_tied(0.051)


def test_the_sign_test_counts_the_pairs_that_differ():
    """Nine of ten answers get right and none wrong: 2 / 2**9, as McNemar's exact test says."""
    before, after = dict.fromkeys(range(10), 0.0), {**dict.fromkeys(range(9), 1.0), 9: 0.0}
    assert_close(sign_test(after, before), 2 / 2**9)
    assert_close(sign_test({**after, 9: -1.0}, before), 22 / 2**10)  # nine of ten, or more extreme
    assert math.isnan(sign_test(before, before))
