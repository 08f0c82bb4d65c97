"""The methods that are compared: name, family, config group, and the learning rates of the sweep.

Rates are tried on one seed and the best on validation is kept. They differ by method because the sizes of what is
trained do: a factor of (IA)^3 wants a hundred times the step of a pretrained kernel.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

SMALL, MEDIUM, LARGE = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)


class Row(NamedTuple):
    """One method of the comparison."""

    family: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]
    tasks: tuple[str, ...] = ("topics",)


BOTH = ("topics", "headlines")
ROWS: dict[str, Row] = {
    "full": Row("selective", {"name": "full"}, SMALL, BOTH),
    "partial": Row("selective", {"name": "partial", "layers": 2}, SMALL),
    "head": Row("selective", {"name": "head"}, MEDIUM),
    "bitfit": Row("selective", {"name": "bitfit"}, MEDIUM),
    "lora": Row("reparameterised", {"name": "lora"}, MEDIUM, BOTH),
    "rslora": Row("reparameterised", {"name": "lora", "rslora": True}, MEDIUM, BOTH),
    "pissa": Row("reparameterised", {"name": "lora", "init": "pissa"}, MEDIUM, BOTH),
    "dora": Row("reparameterised", {"name": "dora"}, MEDIUM, BOTH),
    "ia3": Row("reparameterised", {"name": "ia3"}, LARGE, BOTH),
    "prompt": Row("additive", {"name": "prompt"}, LARGE, BOTH),
}
