"""Statistics of a few seeds: Student's intervals, differences in pairs, and Holm's correction for many of them.

With n pairs a sign or rank test cannot give p < 2 / 2**n, and a percentile bootstrap of three values covers 74 % where
95 % is said. Student's t covers what it says for scores that are about normal.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

LEVEL = 0.95


class Difference(NamedTuple):
    """The mean of differences in pairs, half of its 95 % interval, and the two-sided p value of the paired t test."""

    mean: float
    half: float
    p: float
    pairs: int


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; NaN for one value or none."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def paired_difference(values: Mapping[Any, float], reference: Mapping[Any, float]) -> Difference:
    """The differences `values - reference` under the keys that both have, such as seeds or test items.

    Without a pair everything is NaN. One pair has neither an interval nor a p value, and nor have pairs that all differ
    by the same amount: they say nothing about the noise.
    """
    pairs = [values[key] - reference[key] for key in values if key in reference]
    if not pairs:
        return Difference(math.nan, math.nan, math.nan, 0)
    mean, half = statistics.fmean(pairs), interval(pairs)
    if not half > 0:
        return Difference(mean, half, math.nan, len(pairs))
    t = mean / (statistics.stdev(pairs) / math.sqrt(len(pairs)))
    return Difference(mean, half, float(2 * stats.t.sf(abs(t), len(pairs) - 1)), len(pairs))


def sign_test(values: Mapping[Any, float], reference: Mapping[Any, float]) -> float:
    """The two-sided p value of the exact sign test over the pairs that differ; NaN if none do.

    For answers that are right or wrong it is McNemar's exact test. It needs no spread: pairs that all differ by the
    same amount count.
    """
    signs = [values[key] > reference[key] for key in values if key in reference and values[key] != reference[key]]
    return float(stats.binomtest(sum(signs), len(signs)).pvalue) if signs else math.nan


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979), for comparisons that share a baseline; NaN stays NaN and is not counted."""
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i])
    adjusted, largest = [math.nan] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def is_tied(p: float) -> bool:
    """Whether a comparison with this p value cannot tell the two apart, which one without a p value never can."""
    return not p <= 1 - LEVEL
