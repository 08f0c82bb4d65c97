"""The bases that are compared, and what is tuned on each.

All rows take LoRA's best learning rate of the comparison of methods, so that bases differ and nothing else does.
"""

from typing import Any

from experiments.study.cells import Row

BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"param_dtype": "bfloat16"},
    "int8": {"quantize": {"name": "int8"}},
    "int4": {"quantize": {"name": "int4"}},
    "nf4": {"quantize": {"name": "nf4"}},
    "nf4_double": {"quantize": {"name": "nf4", "double": True}},
    "ternary": {"quantize": {"name": "ternary"}},
}
TASKS = ("topics", "headlines")
LORA = {"name": "lora"}
ROWS = {f"{base}+lora": Row("LoRA", LORA, (3e-3,), TASKS, model) for base, model in BASES.items()}
