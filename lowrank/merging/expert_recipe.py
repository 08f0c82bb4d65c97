"""The keys of a recipe whose models become the experts of one mixture: those of mergekit-moe, and `parameters`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

from lowrank.core.errors import UserError, plural, unknown
from lowrank.merging.expert_layout import LAYOUTS
from lowrank.merging.model_spec import ModelSpec, parse_model
from lowrank.merging.routers import GATE_MODES, PROMPTED

KEYS = ("gate_mode", "experts_per_token", "shared_experts", "architecture")  # of no other recipe


class ExpertKeys(TypedDict, total=False):
    """The keys of an expert."""

    source_model: str
    positive_prompts: list[str]
    negative_prompts: list[str]
    residual_scale: float
    parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Expert:
    """A model whose MLPs become experts, and the texts that are routed to it, or not. `scale` is of its outputs."""

    model: ModelSpec
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    scale: float
    parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The experts of a mixture. `layout` of None is the one of the base's family."""

    experts: tuple[Expert, ...]
    shared: Expert | None
    gate_mode: str
    per_token: int
    layout: str | None


def read_mixture(where: str, raw: Mapping[str, Any]) -> Mixture | None:
    """The mixture that a recipe describes, None for one without experts. Raises UserError naming the key."""
    if not raw.get("experts"):
        if extra := [key for key in KEYS if key in raw]:
            raise UserError(f"{where}: {extra[0]} is for a mixture: list its models in experts")
        return None
    experts = tuple(_expert(where, keys) for keys in raw["experts"])
    shared = tuple(_expert(where, keys) for keys in raw.get("shared_experts") or ())
    mode, per_token, layout = raw.get("gate_mode", "hidden"), raw.get("experts_per_token", 2), raw.get("architecture")
    if mode not in GATE_MODES:
        raise unknown(f"gate_mode in {where}:", mode, GATE_MODES)
    if layout is not None and layout not in LAYOUTS:
        raise unknown(f"architecture in {where}:", layout, LAYOUTS)
    if not 1 <= per_token <= len(experts):
        raise UserError(f"{where}: experts_per_token={per_token} is not in 1..{len(experts)}, the number of experts")
    if len(shared) > 1:
        raise UserError(f"{where}: a layer has one shared expert, and shared_experts lists {len(shared)}")
    if not raw.get("base_model"):
        raise UserError(f"{where}: a mixture needs a base_model, whose tokenizer it has and which reads the prompts")
    if mode in PROMPTED:
        _check_prompts(where, mode, (*experts, *shared))
    return Mixture(experts, shared[0] if shared else None, mode, per_token, layout)


def _expert(where: str, keys: ExpertKeys) -> Expert:
    if not keys.get("source_model"):
        raise UserError(f"{where}: an entry of experts has no source_model")
    positive, negative = tuple(keys.get("positive_prompts") or ()), tuple(keys.get("negative_prompts") or ())
    scale, parameters = float(keys.get("residual_scale", 1.0)), keys.get("parameters") or {}
    return Expert(parse_model(keys["source_model"]), positive, negative, scale, parameters)


def _check_prompts(where: str, mode: str, experts: tuple[Expert, ...]) -> None:
    for expert in experts:
        if not expert.positive:
            raise UserError(f"{where}: gate_mode={mode} needs positive_prompts, and {expert.model} has none")
    if len(experts) > 1 and len({(e.positive, e.negative) for e in experts}) == 1:
        count = plural(len(experts), "expert")
        raise UserError(f"{where}: the {count} have the same prompts, by which no router can tell them apart")
