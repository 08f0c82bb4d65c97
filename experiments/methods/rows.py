"""The methods that are compared: name, family, config group, and the learning rate that its search starts from.

Starts differ by method because the sizes of what is trained do: a factor of (IA)^3 wants a hundred times the step of a
pretrained kernel. One near the best spares runs.
"""

from experiments.study.study import Row

SMALL, MEDIUM, LARGE, LARGER, LARGEST = (3e-4,), (3e-3,), (1e-2,), (3e-2,), (1e-1,)

FORGETTING = True  # is a column of the table
SEARCH = True
SETTINGS = {  # there are many rows and three hours
    "topics": {"steps": 24},
    "headlines": {
        "steps": 16,
        "data.batch_size": 4,
        "optim.warmup": 2,
        "logits_chunk_tokens": 128,  # prompts carry no loss, so most chunks of the head cost nothing
        "eval.max_examples": 32,
    },
}
BOTH = ("topics", "headlines")
SELECTIVE, LOW_RANK, INTRINSIC = "selective", "reparameterised", "intrinsic dimension"
ADDITIVE, EXPERTS = "additive", "experts"
UPCYCLED = {"upcycle": {"experts": 4, "top_k": 2}}  # no wheel has the weights of a mixture of experts
ROWS: dict[str, Row] = {
    "full": Row(SELECTIVE, {"name": "full"}, SMALL, BOTH),
    "partial": Row(SELECTIVE, {"name": "partial", "layers": 2}, SMALL),
    "first": Row(SELECTIVE, {"name": "partial", "first": True}, SMALL),
    "chosen": Row(SELECTIVE, {"name": "chosen"}, SMALL),
    "head": Row(SELECTIVE, {"name": "head"}, LARGER),
    "features": Row(SELECTIVE, {"name": "features"}, LARGER),
    "bitfit": Row(SELECTIVE, {"name": "bitfit"}, MEDIUM, BOTH),
    "norm": Row(SELECTIVE, {"name": "norm"}, LARGE),
    "sparse": Row(SELECTIVE, {"name": "sparse"}, LARGE),
    "sparse_fisher": Row(SELECTIVE, {"name": "sparse", "choose": "fisher"}, LARGE),
    "sparse_random": Row(SELECTIVE, {"name": "sparse", "choose": "random"}, LARGE),
    "sparse_movement": Row(SELECTIVE, {"name": "sparse", "choose": "movement"}, LARGE),
    "tokens": Row(SELECTIVE, {"name": "tokens", "tokens": ["[CLS]", "[SEP]"]}, LARGER),
    "lora": Row(LOW_RANK, {"name": "lora"}, MEDIUM, BOTH),
    "rslora": Row(LOW_RANK, {"name": "lora", "rslora": True}, MEDIUM, BOTH),
    "pissa": Row(LOW_RANK, {"name": "lora", "init": "pissa"}, MEDIUM, BOTH),
    "olora": Row(LOW_RANK, {"name": "lora", "init": "olora"}, MEDIUM),
    "lora_plus": Row(LOW_RANK, {"name": "lora"}, MEDIUM, optim={"b_ratio": 16.0}),
    "lora_fa": Row(LOW_RANK, {"name": "lora_fa"}, MEDIUM),
    "lora_xs": Row(LOW_RANK, {"name": "lora_xs"}, LARGE),
    "vera": Row(LOW_RANK, {"name": "vera"}, LARGER, BOTH),
    "adalora": Row(LOW_RANK, {"name": "adalora"}, LARGER, BOTH),
    "dora": Row(LOW_RANK, {"name": "dora"}, MEDIUM, BOTH),
    "edora": Row(LOW_RANK, {"name": "edora"}, LARGE),
    "bidora": Row(LOW_RANK, {"name": "bidora"}, LARGE, formulas={"topics": 2}),
    "loha": Row(LOW_RANK, {"name": "loha"}, LARGE),
    "lokr": Row(LOW_RANK, {"name": "lokr"}, LARGE),
    "hira": Row(LOW_RANK, {"name": "hira"}, LARGE),
    "oft": Row(LOW_RANK, {"name": "oft"}, MEDIUM),
    "boft": Row(LOW_RANK, {"name": "boft"}, LARGE),
    "relora": Row(LOW_RANK, {"name": "relora"}, MEDIUM, formulas={"topics": 1}),
    "galore": Row(LOW_RANK, {"name": "galore", "every": 12}, MEDIUM, formulas={"topics": 1}),
    "longlora": Row(LOW_RANK, {"name": "longlora", "group": 16}, MEDIUM, ("headlines",)),
    "ia3": Row(LOW_RANK, {"name": "ia3"}, LARGE, BOTH),
    "houlsby": Row(ADDITIVE, {"name": "houlsby"}, MEDIUM, BOTH, formulas={"topics": 1}),
    "pfeiffer": Row(ADDITIVE, {"name": "pfeiffer"}, MEDIUM, formulas={"topics": 1}),
    "parallel": Row(ADDITIVE, {"name": "parallel"}, MEDIUM),
    "scaled_parallel": Row(ADDITIVE, {"name": "scaled_parallel"}, MEDIUM),
    "intrinsic": Row(INTRINSIC, {"name": "intrinsic"}, LARGEST),
    "intrinsic_said": Row(INTRINSIC, {"name": "intrinsic", "said": True}, LARGEST),
    "prefix": Row(ADDITIVE, {"name": "prefix"}, LARGEST, BOTH),
    "prefix_mlp": Row(ADDITIVE, {"name": "prefix", "reparam": True}, MEDIUM),
    "mam": Row(ADDITIVE, {"name": "mam"}, MEDIUM, BOTH),
    "prompt": Row(ADDITIVE, {"name": "prompt"}, LARGEST, BOTH),
    "ptuning": Row(ADDITIVE, {"name": "ptuning"}, LARGE),
    "ptuning_lstm": Row(ADDITIVE, {"name": "ptuning", "encoder": "lstm"}, LARGE),
    "more": Row(EXPERTS, {"name": "more"}, MEDIUM),
    "milora": Row(EXPERTS, {"name": "milora"}, MEDIUM),
    "smore": Row(EXPERTS, {"name": "smore"}, MEDIUM),
    "perft": Row(EXPERTS, {"name": "perft"}, MEDIUM, ("headlines",), UPCYCLED),
    "esft": Row(EXPERTS, {"name": "esft"}, SMALL, ("headlines",), UPCYCLED, formulas={"headlines": 1}),
}
