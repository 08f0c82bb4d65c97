"""The bases that are compared, and what is tuned on each.

Rows of LoRA take one learning rate, so that bases differ and nothing else does: its best in the comparison of methods.
Only ternary kernels, which learn little at it, take the best of three. What adapts all kernels takes the better of two,
all parameters, which QAT trains, a rate near full fine-tuning's. IR-QLoRA calibrates for half a minute on MiniLM, so it
would take five on SmolLM2.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A method on a base, the learning rates that are tried, and the tasks in which it is run."""

    method: Mapping[str, Any]
    rates: tuple[float, ...]
    tasks: tuple[str, ...]
    model: Mapping[str, Any] = MappingProxyType({})  # in addition to the task's own model options

    @property
    def point(self) -> dict[str, Any]:
        """The keys of the config that the row sets."""
        return {"method": dict(self.method), **{f"model.{key}": value for key, value in self.model.items()}}


BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"param_dtype": "bfloat16"},
    "int8": {"quantize": {"name": "int8"}},
    "int4": {"quantize": {"name": "int4"}},
    "int4_asymmetric": {"quantize": {"name": "int4", "symmetric": False}},
    "nf4": {"quantize": {"name": "nf4"}},
    "nf4_double": {"quantize": {"name": "nf4", "double": True}},
    "ternary": {"quantize": {"name": "ternary"}},
    "mixed": {"quantize": {"name": "mixed", "budget": 3.5}},
}
TOPICS, BOTH = ("topics",), ("topics", "headlines")
LORA = {"name": "lora"}
RATES = (3e-3, 1e-2)
KERNELS = r"(layers|top)/(attn|mlp)/\w+/kernel"
ROWS = {f"{base}+lora": Row(LORA, (1e-2,), BOTH, model) for base, model in BASES.items()}
ROWS["int4_asymmetric+lora"] = ROWS["int4_asymmetric+lora"]._replace(tasks=TOPICS)
ROWS["ternary+lora"] = ROWS["ternary+lora"]._replace(rates=(3e-3, 1e-2, 3e-2))
# Against QLoRA on the same kernels: these read the plain base and make the codes themselves.
ROWS |= {
    "nf4+qlora": Row({"name": "lora", "target": KERNELS}, RATES, BOTH, BASES["nf4"]),
    "nf4+qdora": Row({"name": "dora", "target": KERNELS}, RATES, TOPICS, BASES["nf4"]),
    "nf4+loftq": Row({"name": "loftq", "quantize": "nf4"}, RATES, BOTH),
    "nf4+ir_qlora": Row({"name": "ir_qlora"}, RATES, TOPICS),
    "int4_asymmetric+qa_lora": Row({"name": "qa_lora", "block": 32}, RATES, BOTH),
    "int8+modulora": Row({"name": "modulora"}, RATES, TOPICS),
    "int4+qat": Row({"name": "qat", "quantize": "int4"}, (1e-4,), TOPICS),
}
