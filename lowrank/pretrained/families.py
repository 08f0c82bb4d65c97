"""The table of model families: how the `config.json` and the tensors of each map to this package's."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.models import DecoderConfig, EncoderConfig
from lowrank.pretrained import hf_configs, hf_export, hf_tensors
from lowrank.pretrained.hf_tensors import Tensor

Config = DecoderConfig | EncoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    `prefix` is the start of tensor names that a checkpoint of the bare model omits. `ignored` are regexes of tensors
    that the model does not need. `renamed` are the ends of names that older checkpoints have, and today's.
    """

    config: Callable[[Mapping[str, Any]], Config]  # config.json -> our config; raises UserError for unsupported options
    tensors: Callable[[Config], list[Tensor]]  # every leaf, and the tensors that it is read from
    hf_config: Callable[[Config], dict[str, Any]]  # our config -> config.json, for formats without one
    prefix: str
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def current_name(self, name: str) -> str:
        """The name that a tensor of a checkpoint has today."""
        ends = ((old, new) for old, new in self.renamed.items() if name.endswith(old))
        return next((name.removesuffix(old) + new for old, new in ends), name)


_LM = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")
_GPT2 = (r".*attn\.(masked_)?bias", r"lm_head\.weight")
_BERT = (r".*position_ids", r"cls\..*", r"(bert\.)?pooler\..*")
_BERT_NORMS = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
_ROBERTA = (r".*position_ids", r"lm_head\..*", r"(roberta\.)?pooler\..*")


def _llama_like(
    model_type: str, config: Callable[[Mapping[str, Any]], Config], tensors: Callable = hf_tensors.llama
) -> Family:
    return Family(config, tensors, hf_export.LLAMA_LIKE[model_type], "model.", _LM)


FAMILIES: dict[str, Family] = {
    "llama": _llama_like("llama", hf_configs.llama),
    "mistral": _llama_like("mistral", hf_configs.mistral),
    "mixtral": _llama_like("mixtral", hf_configs.mixtral, hf_tensors.mixtral),
    "olmoe": _llama_like("olmoe", hf_configs.olmoe, hf_tensors.sparse),
    "qwen2_moe": _llama_like("qwen2_moe", hf_configs.qwen2_moe, hf_tensors.sparse),
    "qwen3_moe": _llama_like("qwen3_moe", hf_configs.qwen3_moe, hf_tensors.sparse),
    "qwen2": _llama_like("qwen2", hf_configs.qwen2),
    "qwen3": _llama_like("qwen3", hf_configs.qwen3),
    "gemma2": _llama_like("gemma2", hf_configs.gemma2),
    "gemma3_text": _llama_like("gemma3_text", hf_configs.gemma3),
    "gpt2": Family(hf_configs.gpt2, hf_tensors.gpt2, hf_export.gpt2, "transformer.", _GPT2),
    "bert": Family(hf_configs.bert, hf_tensors.bert, hf_export.bert, "bert.", _BERT, _BERT_NORMS),
    "roberta": Family(hf_configs.roberta, hf_tensors.roberta, hf_export.roberta, "roberta.", _ROBERTA, _BERT_NORMS),
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Raises UserError for a `model_type` that is not in the table."""
    name = hf_config.get("model_type")
    if name is None:
        raise UserError("config.json has no 'model_type': it must name one of the known families")
    if name not in FAMILIES:
        raise unknown("model type", name, FAMILIES)
    return FAMILIES[name]
