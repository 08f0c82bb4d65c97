"""The cases of the golden run: every method on each tiny model that takes it, and LoRA with other settings of a run."""

from collections.abc import Mapping
from typing import Any

CHUNK = "logits_chunk_tokens"  # the tokens per device whose logits exist at a time
QV = ".*attn/(q|v)/kernel"
EXPERTS = {"model": {"upcycle": {"experts": 4, "top_k": 2}}}

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "partial": {"layers": 1},
    "head": {},
    "features": {},
    "bitfit": {},
    "norm": {},
    "chosen": {"leaves": ".*mlp/down/kernel"},
    "sparse": {"density": 0.1, "choose": "movement", "batches": 2},
    "tokens": {"tokens": "the"},
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "lora_fa": {"rank": 2},
    "lora_xs": {"rank": 4},
    "edora": {"rank": 4},
    "adalora": {"init_rank": 4, "target_rank": 2, "orthogonal": 0.001},
    "bidora": {"rank": 2, "retrain": 0.3},
    "relora": {"rank": 2, "every": 4},
    "longlora": {"group": 4, "rank": 2, "factor": 2.0},
    "galore": {"rank": 2, "every": 3},
    "ia3": {},
    "prompt": {"length": 4, "init": "vocabulary"},
    "ptuning": {"length": 4, "encoder": "lstm", "hidden": 8},
    "prefix": {"length": 4},
    "mam": {"length": 4, "width": 4, "reparam": True, "hidden": 16},
    "houlsby": {"width": 4},
    "pfeiffer": {"width": 4},
    "parallel": {"width": 4},
    "scaled_parallel": {"width": 4},
    "intrinsic": {"dim": 64, "said": True, "target": QV},
    "more": {"rank": 2, "experts": 3},
    "milora": {"rank": 2},
    "smore": {"gate": 4},
    "loha": {"rank": 2},
    "lokr": {"rank": 1},
    "loftq": {"rank": 2, "target": QV},
    "modulora": {"rank": 2},
    "ir_qlora": {"rank": 2, "calibrate": 10, "target": QV},
    "qa_lora": {"rank": 2, "block": 4, "bits": 2},
    "qat": {"quantize": "ternary", "activations": 8},
    "hira": {"rank": 4},
    "vera": {"rank": 32},
    "oft": {"block": 8},
    "boft": {"block": 4},
}
EXPERT_METHODS: dict[str, dict[str, Any]] = {
    "perft": {"width": 4, "experts": 2},
    "esft": {"share": 0.4, "capacity": 0.5, "batches": 1},
}
DECODERS_ONLY = {"longlora"}
ENCODERS_ONLY = {"features"}

# Other settings of methods, by the name of the method and a word on the setting.
SETTINGS: dict[str, dict[str, Any]] = {
    "partial-first": {"layers": 1, "first": True},
    "sparse-magnitude": {"density": 0.1},
    "lora-dropout": {"rank": 2, "dropout": 0.1},
    "lora-pissa": {"rank": 2, "init": "pissa"},
    "lora-rslora-bias": {"rank": 2, "rslora": True, "bias": "all"},
    "lora-also_tokens": {"rank": 2, "also_tokens": ["the", "cat"]},
    "lora-also_train": {"rank": 2, "also_train": ".*norm/scale"},
    "dora-dropout": {"rank": 2, "dropout": 0.1},
    "prompt-random": {"length": 4},
    "ptuning-mlp": {"length": 4, "hidden": 8},
    "prefix-reparam": {"length": 4, "reparam": True, "hidden": 8},
    "parallel-attn": {"width": 4, "after": "attn"},
    "intrinsic-dense": {"dim": 16, "projection": "dense", "target": QV},
    "lokr-both": {"rank": 1, "decompose_both": True},
    "qat-int4": {"quantize": {"name": "int4", "block": 8}},
    "oft-terms": {"block": 8, "terms": 4},
    "oft-share": {"block": 8, "share": True},
}

# Other settings of the run, with LoRA.
RUNS: dict[str, dict[str, Any]] = {
    "decay-b_ratio": {"optim": {"weight_decay": 0.1, "b_ratio": 16.0}},
    "lr_ratios": {"optim": {"lr_ratios": [[".*/a", 0.5]]}},
    "adafactor": {"optim": {"name": "adafactor"}},
    "sgd": {"optim": {"name": "sgd", "args": {"momentum": 0.9}}},
    "lion": {"optim": {"name": "lion", "lr": 1e-3, "schedule": "cosine"}},
    "accumulate": {"optim": {"accumulate": 2}},
    "bfloat16": {"model": {"param_dtype": "bfloat16", "dtype": "bfloat16"}},
    "remat": {"model": {"remat": "full"}},
    "nf4": {"model": {"quantize": {"name": "nf4", "block": 16}}},
    "int8": {"model": {"quantize": "int8"}},
    "packing": {"data": {"packing": True}},
    "answers": {"data": {"packing": False, "prompt_loss_weight": 0.0}, CHUNK: 8},
    "all-logits": {CHUNK: 0},
}
ENCODER_RUNS = ("decay-b_ratio", "accumulate", "nf4")


def _cases() -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    found |= {f"llama/{name}": _method(name, options) for name, options in (METHODS | SETTINGS).items()}
    found |= {f"llama/{name}": {**_method(name, options), **EXPERTS} for name, options in EXPERT_METHODS.items()}
    found["llama/lora-experts"] = {
        **_method("lora", {"rank": 2, "target": "layers/mlp/experts/(up|down)/kernel"}),
        **EXPERTS,
    }
    found |= {f"llama/lora-{name}": {**_method("lora", {"rank": 2}), **groups} for name, groups in RUNS.items()}
    found |= {f"bert/{name}": _method(name, options) for name, options in METHODS.items()}
    found |= {f"bert/lora-{name}": {**_method("lora", {"rank": 2}), **RUNS[name]} for name in ENCODER_RUNS}
    refused = {f"llama/{name}" for name in ENCODERS_ONLY} | {f"bert/{name}" for name in DECODERS_ONLY}
    return {name: case for name, case in found.items() if name not in refused}


def _method(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"method": {"name": name.partition("-")[0], **options}}


CASES = _cases()
