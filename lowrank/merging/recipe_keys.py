"""The keys that a recipe may have: mergekit's, and a few of our own."""

from typing import Any, TypedDict

from lowrank.core.errors import UserError, nearest
from lowrank.merging.alignment.options import AlignKeys
from lowrank.merging.expert_recipe import ExpertKeys


class Request(TypedDict, total=False):
    """Statistics that are still to be computed, from rows of data; the keys are those of a config's `data` group."""

    data: str
    split: str
    template: str
    completion: str
    truncate: str
    seq_len: int
    seed: int
    rows: int
    labels: str


class Score(TypedDict, total=False):
    """The held-out score of a rule that selects models: the config of a run, `FILE.py:ARG`, and what it leaves open."""

    config: str
    split: str
    metric: str
    max_examples: int


class SourceKeys(TypedDict, total=False):
    """The keys of a model."""

    model: str
    layer_range: list[int]
    parameters: dict[str, Any]
    statistics: str | Request


class SliceKeys(TypedDict, total=False):
    """The keys of a slice."""

    merge_method: str
    sources: list[SourceKeys]
    base_model: str
    parameters: dict[str, Any]


class ModuleKeys(TypedDict, total=False):
    """The keys of a module."""

    models: list[SourceKeys]
    slices: list[SliceKeys]
    parameters: dict[str, Any]


class TokenizerKeys(TypedDict, total=False):
    """The keys of a tokenizer."""

    source: str
    pad_to_multiple_of: int


class RecipeKeys(TypedDict, total=False):
    """The keys of a recipe."""

    merge_method: str
    base_model: str
    models: list[SourceKeys]
    slices: list[SliceKeys]
    modules: dict[str, ModuleKeys]
    experts: list[ExpertKeys]
    shared_experts: list[ExpertKeys]
    gate_mode: str
    experts_per_token: int
    architecture: str
    align: AlignKeys
    score: Score
    parameters: dict[str, Any]
    dtype: str
    out_dtype: str
    tokenizer_source: str
    tokenizer: TokenizerKeys
    chat_template: str
    preset: str
    seed: int
    adapter: dict[str, Any]


def without_nulls(value: Any) -> Any:
    """The value without the keys that are null, which are as good as missing."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def check_keys(where: str, raw: Any, kind: Any) -> None:
    """Raises UserError for a key that this kind of mapping lacks; mergekit may have it."""
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not a mapping of keys to values")
    known = kind.__annotations__
    for key in raw:
        if key not in known:
            raise UserError(f"{where}: the key {key!r} is not supported{nearest(str(key), known)}")
    nested = {"models": SourceKeys, "slices": SliceKeys, "sources": SourceKeys}
    nested |= {"experts": ExpertKeys, "shared_experts": ExpertKeys}
    for key, inner in nested.items():
        for item in raw.get(key) or () if key in known else ():
            check_keys(f"{where}: {key}", item, inner)
    for name, module in (raw.get("modules") or {}).items() if "modules" in known else ():
        check_keys(f"{where}: modules.{name}", module, ModuleKeys)
    if isinstance(raw.get("statistics"), dict) and "statistics" in known:
        check_keys(f"{where}: statistics", raw["statistics"], Request)
        if not raw["statistics"].get("data"):
            raise UserError(f"{where}: the statistics of {raw.get('model')} have no data: name a source of records")
    if raw.get("score") and "score" in known:
        check_keys(f"{where}: score", raw["score"], Score)
    if raw.get("tokenizer"):
        check_keys(f"{where}: tokenizer", raw["tokenizer"], TokenizerKeys)
