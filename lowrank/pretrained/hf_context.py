"""The `config.json` of a model whose context an option extends: one from which transformers computes the same."""

from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError
from lowrank.models import context
from lowrank.pretrained.family import Config, Family

KEYS = (  # of positions, in the configs of all families
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "global_rope_theta",
    "local_rope_theta",
)
FIELDS = ("max_positions", "max_length", "ropes", "rotary_dim")


def extended_config(family: Family, config: Config, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """`hf_config` with the context of `config`; as it is where no option extends it.

    Raises UserError if a `config.json` of the family cannot say how rope is stretched.
    """
    own = context.as_own(config)
    if own is config:
        return dict(hf_config)
    ours = family.hf_config(own)
    kept = {k: v for k, v in hf_config.items() if k not in (*KEYS, "rope_parameters")}
    written = kept | {k: ours[k] for k in KEYS if k in ours}
    try:
        again = family.config(written)
        same = all(getattr(again, field) == getattr(own, field) for field in FIELDS)
    except UserError:
        same = False
    if not same:
        model_type = hf_config.get("model_type")
        asked = f"context={config.context} by model.rope={config.rope}" if config.context else "position_factor"
        raise UserError(f"model.{asked} cannot be written to a {model_type} config.json: choose another model.rope")
    return written
