"""Marks of the rows of a table: those that cannot be told from the baseline, and those of an earlier version."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.protocol.table import as_number
from lowrank.sweeps.statistics import is_tied
from lowrank.sweeps.tables import SAME

EARLIER = "†"  # a row of an earlier version of the study


def same_mark(row: Mapping[str, Any], difference: str) -> str:
    """SAME after a space if the row's `difference`, such as `minus_lora`, cannot be told from none.

    Holm's p value decides. A row that has none is tied if its interval covers 0 or has no width, and one without a
    difference has no mark.
    """
    mean, half, p = (as_number(str(row[key])) for key in (f"{difference}_mean", f"{difference}_ci95", "p_holm"))
    if math.isnan(mean):
        return ""
    tied = not abs(mean) > half > 0 if math.isnan(p) else is_tied(p)
    return f" {SAME}" if tied else ""


def earlier_mark(row: Mapping[str, Any]) -> str:
    """EARLIER after a space if the row is of an earlier version of the study."""
    return f" {EARLIER}" if is_earlier(row) else ""


def is_earlier(row: Mapping[str, Any]) -> bool:
    """Whether a row of a table is of an earlier version of the study."""
    return str(row["earlier"]) == "True"
