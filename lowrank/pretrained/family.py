"""One model family, as a value: how its `config.json` and its tensors map to this package's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lowrank.models import DecoderConfig, EncoderConfig
from lowrank.pretrained import hf_tensors
from lowrank.pretrained.hf_tensors import Tensor

Config = DecoderConfig | EncoderConfig
ROPE_TABLES = r".*rotary_emb\.inv_freq"


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    `prefix` is the start of tensor names that a checkpoint of the bare model omits. `ignored` are regexes of tensors
    that the model does not need. `renamed` are the ends of names that older checkpoints have, and today's.
    """

    config: Callable[[Mapping[str, Any]], Config]  # config.json -> our config; raises UserError for unsupported options
    tensors: Callable[[Any], list[Tensor]]  # every leaf, and the tensors that it is read from
    hf_config: Callable[[Any], dict[str, Any]]  # our config -> config.json, for formats without one
    prefix: str
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def current_name(self, name: str) -> str:
        """The name that a tensor of a checkpoint has today."""
        ends = ((old, new) for old, new in self.renamed.items() if name.endswith(old))
        return next((name.removesuffix(old) + new for old, new in ends), name)


def llama_like(
    config: Callable[[Mapping[str, Any]], Config],
    hf_config: Callable[[Any], dict[str, Any]],
    tensors: Callable[[Any], list[Tensor]] = hf_tensors.llama,
) -> Family:
    """A family with Llama's tensor names."""
    return Family(config, tensors, hf_config, "model.", (ROPE_TABLES, r"lm_head\.weight"))
