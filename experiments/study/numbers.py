"""Means over few seeds with their confidence intervals, and tables of such numbers."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.core.files import write_text

SAME, EARLIER = "≈", "†"  # a score that cannot be told from LoRA's; a score of earlier formulas
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; NaN for one value."""
    n = len(values)
    return T95[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def format_mean(mean: float, spread: float) -> str:
    """`0.927 ± 0.026`, without an interval if it is NaN; numbers of at least ten thousand have three digits."""
    digits = ".3f" if abs(mean) < 1e4 else ".2e"
    return f"{mean:{digits}}" + ("" if math.isnan(spread) else f" ± {spread:{digits}}")


def same_mark(row: Mapping[str, Any]) -> str:
    """SAME after a space if the row's differences from LoRA have an interval over 0, or of no width, or none."""
    mean, half = (float(row.get(f"minus_lora_{name}") or math.nan) for name in ("mean", "ci95"))
    return "" if row["method"] == "lora" or abs(mean) > half > 0 else f" {SAME}"


def earlier_mark(row: Mapping[str, Any]) -> str:
    """EARLIER after a space if the row's scores are of earlier formulas than its method's."""
    return f" {EARLIER}" if str(row["earlier_formulas"]) == "True" else ""


def write_csv(path: Path, columns: Sequence[str], table: Sequence[Mapping[str, Any]]) -> None:
    """Writes the table with these columns, and its fractions with six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    write_text(path, text.getvalue())
