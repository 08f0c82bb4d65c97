"""DeBERTa-v2 and v3: BERT with attention to relative positions, in the form that v3 has it."""

from typing import Any

from lowrank.core.errors import UserError
from lowrank.models import EncoderConfig
from lowrank.pretrained import hf_configs, hf_export
from lowrank.pretrained.family import Family
from lowrank.pretrained.hf_configs import HF
from lowrank.pretrained.hf_tensors import Tensor, linear_rows, norm_rows, stacked, whole

DEFAULTS = {"layer_norm_eps": 1e-7, "type_vocab_size": 0}
V3 = {
    "relative_attention": True,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 0,
}
WITHOUT = {"relative_attention": False, "position_biased_input": True, "share_att_key": False, "norm_rel_ebd": "none"}


def config(hf: HF) -> EncoderConfig:
    """DeBERTa's `config.json` as our config. Raises UserError for attention that is not that of v3."""
    for key, fine in V3.items():
        if (given := hf.get(key, WITHOUT.get(key, fine))) != fine:
            raise UserError(f"config.json's {key}={given!r} is not supported (only {fine!r}, as in DeBERTa-v3)")
    kinds, buckets = hf.get("pos_att_type") or [], hf.get("position_buckets", -1)
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    if sorted(kinds) != ["c2p", "p2c"] or buckets < 1:
        raise UserError(f"config.json's pos_att_type={kinds!r} with position_buckets={buckets} is not supported")
    fields = hf_configs.rename_fields({**DEFAULTS, **hf}, hf_configs.BERT)
    if hf.get("embedding_size", fields["width"]) != fields["width"]:
        raise UserError(f"config.json's embedding_size={hf['embedding_size']} must be hidden_size={fields['width']}")
    distance = hf.get("max_relative_positions", -1)
    return EncoderConfig(
        **fields,
        learned_positions=False,
        rope_layers=(False,) * fields["layers"],
        relative_buckets=buckets,
        relative_distance=distance if distance > 0 else fields["max_positions"],
        activation=hf_configs.read_activation(hf, "hidden_act", "gelu"),
        dense_head=True,
        head_activation=hf_configs.read_activation(hf, "pooler_hidden_act", "gelu"),
    )


def tensors(c: EncoderConfig) -> list[Tensor]:
    """The leaves of DeBERTa; its pooler is the first layer of a classifier's head."""
    names = {"q": "self.query_proj", "k": "self.key_proj", "v": "self.value_proj", "o": "output.dense"}
    rows = [row for n, hf in names.items() for row in linear_rows(f"attn/{n}", f"attention.{hf}", True)]
    rows += norm_rows("attn_norm", "attention.output.LayerNorm", True)
    rows += linear_rows("mlp/up", "intermediate.dense", True) + linear_rows("mlp/down", "output.dense", True)
    rows += norm_rows("mlp_norm", "output.LayerNorm", True)
    tables = {"embedding": "embeddings.word_embeddings", "relative": "encoder.rel_embeddings"}
    tables |= {"types": "embeddings.token_type_embeddings"} if c.types else {}
    ends = [(f"embed/{leaf}", f"deberta.{hf}.weight", False) for leaf, hf in tables.items()]
    ends += norm_rows("embed/norm", "deberta.embeddings.LayerNorm", True)
    ends += norm_rows("embed/relative_norm", "deberta.encoder.LayerNorm", True)
    if c.num_labels:
        ends += linear_rows("head/dense", "pooler.dense", True) + linear_rows("head/out", "classifier", True)
    return [*whole(ends), *stacked(c, "deberta.encoder.layer", rows)]


def hf_config(c: EncoderConfig) -> dict[str, Any]:
    """Our config as DeBERTa-v3's `config.json`."""
    model, classifier = "DebertaV2Model", "DebertaV2ForSequenceClassification"
    fields = hf_export.hf_fields(c, "deberta-v2", hf_configs.BERT, model, classifier) | V3
    return fields | {
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": c.relative_buckets,
        "max_relative_positions": c.relative_distance,
        "hidden_act": hf_export.ACTIVATIONS[c.activation],
        "pooler_hidden_act": hf_export.ACTIVATIONS[c.head_activation],
        "pad_token_id": 0,
    }


IGNORED = (r".*position_ids", r"(cls|lm_predictions|mask_predictions|pooler)\..*", r".*\.position_embeddings\.weight")
FAMILY = Family(config, tensors, hf_config, "deberta.", IGNORED)
