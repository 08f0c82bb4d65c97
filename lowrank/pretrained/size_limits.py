"""The sizes of a `config.json`, checked against the header of its checkpoint before anything of that size is made."""

import math
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, plural
from lowrank.pretrained.tensor_reader import StoredTensor

LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
SIZES = (
    *("vocab_size", "type_vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads"),
    *("num_key_value_heads", "num_experts", "num_local_experts", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "n_embd", "n_inner", "n_head", "n_positions", "dim", "hidden_dim", "n_heads"),
)
COUNTS = (*LAYERS, *SIZES, "max_position_embeddings", "num_experts_per_tok", "max_window_layers", "sliding_window")
LARGEST = 2**31 - 1  # of any count
DEEPEST = 10_000  # layers of a model whose tensors are not there


def check_sizes(where: str, hf_config: Mapping[str, Any], stored: Mapping[str, StoredTensor] | None = None) -> None:
    """Raises UserError naming the first count of a config that is more than its `stored` tensors can hold.

    A model has at least one tensor a layer, and one number for each unit of any other size. Without the tensors, a
    count may be as large as memory is likely to allow.
    """
    numbers = LARGEST if stored is None else sum(math.prod(tensor.shape) for tensor in stored.values())
    tensors = DEEPEST if stored is None else len(stored)
    holds = "" if stored is None else f", and its files hold {plural(tensors, 'tensor')} of {plural(numbers, 'number')}"
    limits = {**dict.fromkeys(COUNTS, LARGEST), **dict.fromkeys(SIZES, numbers), **dict.fromkeys(LAYERS, tensors)}
    for key, limit in limits.items():
        if (hf_config.get(key) or 0) > limit:
            raise UserError(
                f"{where}: config.json's {key} is {hf_config[key]}{holds or f': at most {limit} is possible'}"
            )
