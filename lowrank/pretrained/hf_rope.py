"""Rope in a `config.json`: its parameters in their old and new form, as our theta and scaling, and back."""

from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError, unknown
from lowrank.models.rope_scaling import KINDS, RopeScaling

HF = Mapping[str, Any]
NAMES = {  # the numbers of scalings, by our names
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
    "short": "short_factor",
    "long": "long_factor",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
DEFAULTS = RopeScaling("linear")


def rope_parameters(hf: HF) -> HF:
    """The rope parameters: old configs have `rope_theta` and `rope_scaling`, new ones `rope_parameters`.

    Where a config has both forms, `rope_scaling` replaces `rope_parameters`, and `rope_theta` is for what lacks it.
    Raises UserError if their thetas differ.
    """
    new, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling")
    top = {"rope_theta": hf["rope_theta"]} if hf.get("rope_theta") else {}
    params = {**top, **(scaling or new)}
    theta = params.get("rope_theta", 10000.0)
    if scaling and new.get("rope_theta", theta) != theta:
        raise UserError(
            f"config.json has the rope_theta {new['rope_theta']!r} in rope_parameters, which rope_scaling replaces, "
            f"and {theta!r} for rope_scaling: leave one of the two out"
        )
    return params


def read_rope(params: HF, theta: float, hf: HF) -> tuple[float, RopeScaling | None]:
    """`(theta, scaling)` of rope parameters in the old form (`type`) or the new one (`rope_type`).

    `theta` is that of parameters without one, and `hf` the config, in which other fields stand for what they lack.
    Raises UserError for an unknown kind, for numbers that it needs, and for a share of the head that is not the whole.
    """
    kind = params.get("rope_type") or params.get("type") or "default"
    if params.get("partial_rotary_factor") not in (None, 1.0):
        share = params["partial_rotary_factor"]
        raise UserError(f"config.json's partial_rotary_factor={share!r} is not supported (only 1.0)")
    theta = float(params.get("rope_theta") or theta)
    if kind == "default":
        return theta, None
    if kind not in KINDS:
        raise unknown("rope scaling", kind, ["default", *KINDS])
    fields = {ours: params.get(NAMES[ours]) for ours in KINDS[kind].fields}
    fields |= _from_config(kind, params, hf)
    if "truncate" in fields and "truncate" in params:
        fields["truncate"] = bool(params["truncate"])  # a null is false to transformers
    for ours in KINDS[kind].fields:
        if fields[ours] is None and ours not in KINDS[kind].optional:
            raise UserError(f"config.json's rope scaling {kind!r} has no {NAMES[ours]!r}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if v is not None}
    return theta, RopeScaling(kind, **values)


def _from_config(kind: str, params: HF, hf: HF) -> dict[str, Any]:
    """The numbers of a scaling that a `config.json` has elsewhere, as transformers finds them.

    The original context is the one at the top level, else that of the parameters, else the whole context, as which
    `dynamic` always takes it. A factor that is null, and one that LongRoPE lacks, is the whole context over it.
    """
    if "original_positions" not in KINDS[kind].fields:
        return {}
    whole = hf.get("max_position_embeddings")
    if kind == "dynamic":
        return {"original_positions": whole}
    top = hf.get("original_max_position_embeddings")
    original = top or params.get("original_max_position_embeddings") or whole
    factor = params.get("factor")
    if factor is None and (kind == "longrope" or "factor" in params) and whole and original:
        factor = max(whole / original, 1.0)
    return {"original_positions": original, "factor": factor}


def rope_fields(theta: float, s: RopeScaling | None) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` if rope is scaled: the form that all versions of transformers read."""
    if s is None:
        return {"rope_theta": theta}
    kind = KINDS[s.kind]
    values = {x: getattr(s, x) for x in kind.fields}
    values = {k: v for k, v in values.items() if k not in kind.optional or v != getattr(DEFAULTS, k)}
    if s.kind == "dynamic":  # it has the whole context for the original one
        del values["original_positions"]
    scaling = {NAMES[k]: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": s.kind, **scaling}}
