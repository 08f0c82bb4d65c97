"""The table of model families: how the `config.json` and the tensors of each map to this package's."""

from collections.abc import Callable, Mapping
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.pretrained import family, hf_configs, hf_export, hf_tensors
from lowrank.pretrained.architectures import (
    deberta,
    distilbert,
    gemma,
    gpt_neox,
    granite,
    modernbert,
    olmo2,
    phi3,
    smollm3,
)
from lowrank.pretrained.family import Config, Family

__all__ = ["FAMILIES", "Config", "Family", "family_of"]
_GPT2 = (r".*attn\.(masked_)?bias", r"lm_head\.weight")
_BERT = (r".*position_ids", r"cls\..*", r"(bert\.)?pooler\..*")
_BERT_NORMS = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
_ROBERTA = (r".*position_ids", r"lm_head\..*", r"(roberta\.)?pooler\..*")


def _llama_like(
    model_type: str, config: Callable[[Mapping[str, Any]], Config], tensors: Callable = hf_tensors.llama
) -> Family:
    return family.llama_like(config, hf_export.LLAMA_LIKE[model_type], tensors)


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
    "gemma": gemma.FAMILY,
    "granite": granite.FAMILY,
    "olmo2": olmo2.FAMILY,
    "phi3": phi3.FAMILY,
    "smollm3": smollm3.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "gpt2": Family(hf_configs.gpt2, hf_tensors.gpt2, hf_export.gpt2, "transformer.", _GPT2),
    "distilbert": distilbert.FAMILY,
    "modernbert": modernbert.FAMILY,
    "deberta-v2": deberta.FAMILY,
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
