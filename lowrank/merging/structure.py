"""The structure of a result: its config, and which tensors come before its layers and which after them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core.errors import UserError
from lowrank.merging.checkpoint import LAYER_COUNTS, Checkpoint

VOCABULARY = re.compile(r".*(embed_tokens|wte|word_embeddings|lm_head)\.weight")  # tensors with a row per token
FIRST = re.compile(r".*(embed|wte|wpe).*")


def is_last(name: str) -> bool:
    """Whether a tensor outside of the layers comes after them: the final norm and the head."""
    return not FIRST.fullmatch(name)


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises UserError for models of different families, and where one's head is its embedding and another's is not."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        kinds = [c.hf_config.get("model_type") for c in (first, other)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{first.spec} is a {kinds[0]} and {other.spec} a {kinds[1]}: their architectures differ")
        if first.tied != other.tied:
            tied, untied = (first, other) if first.tied else (other, first)
            raise UserError(
                f"the head of {tied.spec} is its embedding, and {untied.spec} has a head of its own: "
                "store the head of both, and set tie_word_embeddings to false"
            )


def stacked_config(config: Mapping[str, Any], layers: Sequence[int], dtype: str) -> dict[str, Any]:
    """`config.json` of a model whose layers are those of `config` at `layers`, which may repeat.

    Lists with one value for each layer are rewritten, as is the number of layers.
    """
    depth = next((config[key] for key in LAYER_COUNTS if config.get(key)), 0)
    changed = dict(config)
    if list(layers) != list(range(depth)):
        for key, value in config.items():
            if key in LAYER_COUNTS and value == depth:
                changed[key] = len(layers)
            elif isinstance(value, list) and len(value) == depth and key not in ("architectures", "eos_token_id"):
                changed[key] = [value[i % depth] for i in layers]
        if isinstance(config.get("max_window_layers"), int):
            changed["max_window_layers"] = len(layers)
    changed.pop("dtype", None)
    return changed | {"torch_dtype": dtype}
