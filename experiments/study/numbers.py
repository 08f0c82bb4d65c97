"""Marks of a study's scores: those that cannot be told from LoRA's, and those of earlier formulas."""

import math
from collections.abc import Mapping
from typing import Any

from lowrank.sweeps.tables import SAME

EARLIER = "†"  # a score of earlier formulas


def same_mark(row: Mapping[str, Any]) -> str:
    """SAME after a space if the row's differences from LoRA have an interval over 0, or of no width, or none."""
    mean, half = (float(row.get(f"minus_lora_{name}") or math.nan) for name in ("mean", "ci95"))
    return "" if row["method"] == "lora" or abs(mean) > half > 0 else f" {SAME}"


def earlier_mark(row: Mapping[str, Any]) -> str:
    """EARLIER after a space if the row's scores are of earlier formulas than its method's."""
    return f" {EARLIER}" if str(row["earlier_formulas"]) == "True" else ""
