"""Training objectives: what a batch must hold, the loss as a sum and its weight, and how texts or labels are scored.

A new objective is one file and one line in `OBJECTIVES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lowrank.core import config_schema
from lowrank.core.errors import unknown
from lowrank.objectives.causal_lm import causal_lm
from lowrank.objectives.classification import classification
from lowrank.objectives.grpo import grpo
from lowrank.objectives.kto import kto
from lowrank.objectives.objective import Objective, Score
from lowrank.objectives.preference import preference
from lowrank.objectives.reward import reward

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "causal_lm": causal_lm,
    "classification": classification,
    "grpo": grpo,
    "kto": kto,
    "preference": preference,
    "reward": reward,
}


def build_objective(setting: str | Mapping[str, Any]) -> Objective:
    """The objective of a config: its name, or a group `{"name": ..., key: value}` with options of the function.

    Raises UserError for an unknown name or option.
    """
    group = {"name": setting} if isinstance(setting, str) else dict(setting)
    name = group.pop("name", None)
    if name not in OBJECTIVES:
        raise unknown("objective", str(name), OBJECTIVES)
    return config_schema.call_with_group(OBJECTIVES[name], group, "objective")


__all__ = [
    "OBJECTIVES",
    "Objective",
    "Score",
    "build_objective",
    "causal_lm",
    "classification",
    "grpo",
    "kto",
    "preference",
    "reward",
]
