"""Means of few seeds and how far to trust them."""

import math
import statistics
from collections.abc import Sequence

# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; NaN for one value."""
    n = len(values)
    return T95[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
