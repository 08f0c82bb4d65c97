"""The bases that are compared, and what is tuned on each.

Rows of LoRA take one learning rate, so that bases differ and nothing else does: its best in the comparison of methods.
Only ternary kernels, which learn little at it, take the best of three. What adapts all kernels takes the better of two,
all parameters, which QAT trains, a rate near full fine-tuning's. IR-QLoRA calibrates for half a minute on MiniLM, so it
would take five on SmolLM2.
"""

from typing import Any

from experiments.study.study import Row

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
FORGETTING, SEARCH, SETTINGS = False, False, {}
TOPICS, BOTH = ("topics",), ("topics", "headlines")
LORA = {"name": "lora"}
RATES = (3e-3, 1e-2)
KERNELS = r"(layers|top)/(attn|mlp)/\w+/kernel"
ROWS = {f"{base}+lora": Row("LoRA", LORA, (1e-2,), BOTH, model) for base, model in BASES.items()}
ROWS["int4_asymmetric+lora"] = ROWS["int4_asymmetric+lora"]._replace(tasks=TOPICS)
ROWS["ternary+lora"] = ROWS["ternary+lora"]._replace(rates=(1e-2, 3e-3, 3e-2))
# Against QLoRA on the same kernels: these read the plain base and make the codes themselves.
ROWS |= {
    "nf4+qlora": Row("QLoRA", {"name": "lora", "target": KERNELS}, RATES, BOTH, BASES["nf4"]),
    "nf4+qdora": Row("QDoRA", {"name": "dora", "target": KERNELS}, RATES, TOPICS, BASES["nf4"]),
    "nf4+loftq": Row("LoftQ", {"name": "loftq", "quantize": "nf4"}, RATES, BOTH),
    "nf4+ir_qlora": Row("IR-QLoRA", {"name": "ir_qlora"}, RATES, formulas={"topics": 1}),
    "int4_asymmetric+qa_lora": Row("QA-LoRA", {"name": "qa_lora", "block": 32}, RATES, BOTH),
    "int8+modulora": Row("ModuLoRA", {"name": "modulora"}, RATES, TOPICS),
    "int4+qat": Row("QAT", {"name": "qat", "quantize": "int4"}, (1e-4,), TOPICS),
}
