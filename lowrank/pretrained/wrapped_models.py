"""Models whose language model is wrapped with others, as Gemma 3 and Mistral 3 are with one of images.

The language model is read alone: its config is `text_config`, and its tensors are renamed to those of its own family.
"""

import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from lowrank.core.errors import UserError, plural
from lowrank.pretrained.tensor_reader import StoredTensor

GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
DEFAULTS = {"gemma3": GEMMA3}  # what transformers assumes of the text models of these types
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config", "torch_dtype")
_NAMES = (  # the start of a tensor's name, and what stands for it in the text model alone
    (re.compile(r"^(model\.)?language_model\.model\."), "model."),
    (re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\."), "model."),
    (re.compile(r"^lm_head\."), "lm_head."),
)


def text_config(where: str, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model; that of a model which is not wrapped stays as it is."""
    text = hf_config.get("text_config")
    if text is None:
        return hf_config
    if not isinstance(text, Mapping):
        raise UserError(f"{where}: config.json's 'text_config' is not an object")
    shared = {key: hf_config[key] for key in SHARED if hf_config.get(key) is not None}
    return {**DEFAULTS.get(str(hf_config.get("model_type")), {}), **shared, **text}


def text_tensors(where: str, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the language model under the names of its family; the log says how many others are skipped.

    Raises UserError for a checkpoint without any tensor of a language model.
    """
    found = {new: tensor for name, tensor in stored.items() if (new := text_name(name))}
    if not found:
        raise UserError(
            f"{where} has a text_config, but no tensors under 'language_model.': it holds no language model"
        )
    skipped = [name for name in stored if not text_name(name)]
    if skipped:
        count = plural(len(skipped), "tensor")
        logging.info("%s: the language model is read alone; %s skipped, such as %s", where, count, min(skipped))
    return found


def text_name(name: str) -> str | None:
    """The name of a tensor in the language model alone, or None for a tensor of another model."""
    return next((pattern.sub(new, name) for pattern, new in _NAMES if pattern.match(name)), None)
