"""DistilBERT: BERT without token types and pooler, whose classifier has a ReLU layer."""

from typing import Any

from lowrank.models import EncoderConfig
from lowrank.pretrained import hf_configs, hf_export
from lowrank.pretrained.family import Family
from lowrank.pretrained.hf_configs import HF
from lowrank.pretrained.hf_tensors import Tensor, linear_rows, norm_rows, stacked, whole

FIELDS = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "width": "dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "hidden": "hidden_dim",
}


def config(hf: HF) -> EncoderConfig:
    """DistilBERT's `config.json` as our config."""
    return EncoderConfig(
        **hf_configs.rename_fields(hf, FIELDS),
        types=0,
        activation=hf_configs.read_activation(hf, "activation", "gelu"),
        dense_head=True,
        head_activation="relu",
    )


def tensors(c: EncoderConfig) -> list[Tensor]:
    """The leaves of DistilBERT."""
    rows = [row for n in "qkv" for row in linear_rows(f"attn/{n}", f"attention.{n}_lin", True)]
    rows += linear_rows("attn/o", "attention.out_lin", True) + norm_rows("attn_norm", "sa_layer_norm", True)
    rows += linear_rows("mlp/up", "ffn.lin1", True) + linear_rows("mlp/down", "ffn.lin2", True)
    rows += norm_rows("mlp_norm", "output_layer_norm", True)
    tables = {"embedding": "word_embeddings", "positions": "position_embeddings"}
    ends = [(f"embed/{leaf}", f"distilbert.embeddings.{hf}.weight", False) for leaf, hf in tables.items()]
    ends += norm_rows("embed/norm", "distilbert.embeddings.LayerNorm", True)
    if c.pooling == "pooler":
        ends += linear_rows("pooler", "distilbert.pooler.dense", True)
    if c.num_labels:
        ends += linear_rows("head/dense", "pre_classifier", True) + linear_rows("head/out", "classifier", True)
    return [*whole(ends), *stacked(c, "distilbert.transformer.layer", rows)]


def hf_config(c: EncoderConfig) -> dict[str, Any]:
    """Our config as DistilBERT's `config.json`."""
    model, classifier = "DistilBertModel", "DistilBertForSequenceClassification"
    fields = hf_export.hf_fields(c, "distilbert", FIELDS, model, classifier)
    return fields | {"activation": hf_export.ACTIVATIONS[c.activation], "pad_token_id": 0}


IGNORED = (r".*position_ids", r"vocab_(transform|layer_norm|projector)\..*")
FAMILY = Family(config, tensors, hf_config, "distilbert.", IGNORED)
