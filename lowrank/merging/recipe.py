"""Recipes: mergekit's YAML, and a few keys of our own, as a checked value.

The deliberate differences from mergekit are listed in docs/guides/merge_models.md.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lowrank.core import paths, schema, unique_yaml
from lowrank.core.errors import UserError, plural, unknown
from lowrank.core.paths import PathLike
from lowrank.merging.alignment.options import Options, read_align
from lowrank.merging.expert_recipe import Mixture, read_mixture
from lowrank.merging.model_spec import ModelSpec, parse_model
from lowrank.merging.recipe_keys import (
    ModuleKeys,
    RecipeKeys,
    Request,
    Score,
    SourceKeys,
    check_keys,
    without_nulls,
)
from lowrank.merging.rule import PRESETS, Rule
from lowrank.merging.rules import RULES

DTYPES = ("float32", "bfloat16", "float16", "float64")
Parameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """One model of a slice; `layers` is `(first, end)`, the end exclusive, or None for all of them.

    `statistics` are the file of its statistics, or what they are to be computed from.
    """

    model: ModelSpec
    layers: tuple[int, int] | None
    parameters: Parameters
    statistics: str | Request | None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers that are blended of the sources; slices are stacked.

    `method` and `base` are its own, or those of the recipe.
    """

    sources: tuple[Source, ...]
    base: ModelSpec | None
    parameters: Parameters
    method: str

    @property
    def rule(self) -> Rule:
        """The rule that its method names."""
        return RULES[self.method]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. `parameters` are those of all slices, the first ones before the others.

    `out_dtype` of None is the dtype of the first model. `adapter` is the group for an adapter as output.
    """

    method: str
    base: ModelSpec | None
    slices: tuple[Slice, ...]
    parameters: tuple[Parameters, ...]
    out_dtype: str | None
    wide: bool
    preset: str
    seed: int
    tokenizer: str | None
    pad_to_multiple_of: int
    chat_template: str | None
    adapter: Mapping[str, Any] | None
    mixture: Mixture | None
    align: Options | None
    score: Score | None
    text: str

    @property
    def rule(self) -> Rule:
        """The rule that it names."""
        return RULES[self.method]

    @property
    def title(self) -> str:
        """The rules of its slices in words, and the number of its experts."""
        methods = " and ".join(dict.fromkeys(part.method for part in self.slices))
        experts = plural(len(self.mixture.experts), "expert") if self.mixture else ""
        return f"mixture of {experts}, the rest by {methods}," if experts else methods

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        """Every model that it names, once: the base first."""
        listed = [source.model for part in self.slices for source in part.sources]
        bases = [base for base in (self.base, *(part.base for part in self.slices)) if base]
        mixture = self.mixture
        experts = [*mixture.experts, *([mixture.shared] if mixture.shared else [])] if mixture else []
        return tuple(dict.fromkeys([*bases, *listed, *(expert.model for expert in experts)]))


def read_recipe(path: PathLike) -> Recipe:
    """The recipe in a YAML file. Raises UserError for a file that cannot be read, and as `parse_recipe` does."""
    try:
        text = paths.read_text(paths.as_path(path))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"recipe {path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str = "the recipe") -> Recipe:
    """The recipe in a YAML text. Raises UserError naming the key for a text that is not one."""
    try:
        raw = without_nulls(unique_yaml.load(where, text))
    except (yaml.YAMLError, RecursionError) as e:
        raise UserError(f"{where} is not YAML: {' '.join(str(e).split())}") from None
    check_keys(where, raw, RecipeKeys)
    schema.check(where, raw, RecipeKeys)
    mixture = read_mixture(where, raw)
    method = _method(where, raw.get("merge_method") or ("uniform_soup" if mixture else None))
    base = parse_model(raw["base_model"]) if raw.get("base_model") else None
    content, parameters = _content(where, raw)
    slices = _of_mixture(where, mixture, base, method) if mixture else _slices(where, content, base, method)
    tokenizer = raw.get("tokenizer") or {}
    if tokenizer and raw.get("tokenizer_source"):
        raise UserError(f"{where} has both tokenizer and tokenizer_source: leave out tokenizer_source")
    seed, multiple = raw.get("seed", 0), tokenizer.get("pad_to_multiple_of", 1)
    for key, value, least in (("seed", seed, 0), ("tokenizer.pad_to_multiple_of", multiple, 1)):
        if value < least:
            raise UserError(f"{where}: {key}={value} is below {least}")
    chat = raw.get("chat_template")
    if chat and chat != "auto" and "{" not in chat:  # a name such as mergekit's chatml
        raise UserError(f"{where}: chat_template={chat!r} is not a Jinja template: write it out, or auto")
    align = read_align(where, raw.get("align"))
    if align:
        _check_aligned(where, align, slices, vocabulary=bool(raw.get("tokenizer_source") or tokenizer))
    dtype = raw.get("dtype")
    return Recipe(
        method,
        base,
        slices,
        parameters,
        _one_of(where, "out_dtype", raw.get("out_dtype") or dtype, DTYPES),
        _one_of(where, "dtype", dtype, DTYPES) == "float64",
        _one_of(where, "preset", raw.get("preset") or "mergekit", PRESETS),
        seed,
        raw.get("tokenizer_source") or tokenizer.get("source"),
        multiple,
        chat,
        raw.get("adapter"),
        mixture,
        align,
        _score(where, raw.get("score"), method, align),
        text,
    )


def _score(where: str, score: Score | None, method: str, align: Options | None) -> Score | None:
    if score is None:
        return None
    if not RULES[method].select and align is None:
        raise UserError(f"{where}: {method} selects no model by a score: leave out score, or take greedy_soup")
    if not score.get("config"):
        raise UserError(f"{where}: score has no config: name the file of a run's config")
    return score


def _method(where: str, name: Any) -> str:
    if name not in RULES:
        raise unknown(f"merge_method in {where}:", str(name), RULES)
    return str(name)


def _one_of(where: str, key: str, value: Any, names: Sequence[str]) -> Any:
    if value is not None and value not in names:
        raise unknown(f"{key} in {where}:", str(value), names)
    return value


def _content(where: str, raw: RecipeKeys) -> tuple[ModuleKeys, tuple[Parameters, ...]]:
    """`(the mapping that has models or slices, parameters of all slices)`."""
    present = [key for key in ("models", "slices", "modules", "experts") if raw.get(key)]
    if len(present) != 1:
        raise UserError(
            f"{where} needs exactly one of models, slices, modules and experts, and has {' and '.join(present) or 0}"
        )
    own = raw.get("parameters") or {}
    if present != ["modules"]:
        return {key: raw[key] for key in present}, (own,)  # type: ignore[literal-required,return-value]
    if len(raw["modules"]) > 1:
        raise UserError(f"{where}: models of several modules are not supported: {', '.join(raw['modules'])}")
    (module,) = raw["modules"].values()
    if bool(module.get("models")) == bool(module.get("slices")):
        raise UserError(f"{where}: a module needs either models or slices")
    return module, (module.get("parameters") or {}, own)


def _check_aligned(where: str, align: Options, slices: Sequence[Slice], *, vocabulary: bool) -> None:
    """Raises UserError for what does not move with the tensors that are aligned, and for layers that do not meet."""
    for part in slices:
        if part.rule.statistics:
            raise UserError(f"{where}: the statistics of {part.method} are of the order before align: leave one out")
        if len({source.layers for source in part.sources}) > 1:
            raise UserError(f"{where}: align matches layers of one number, and a slice has layers of several")
    if align.residual and vocabulary:
        raise UserError(f"{where}: align.residual moves what tokenizer_source reads: leave one out")


def _of_mixture(where: str, mixture: Mixture, base: ModelSpec | None, method: str) -> tuple[Slice, ...]:
    """The merge of all that the models of a mixture do not keep apart; passthrough takes the base's tensors."""
    rule = RULES[method]
    if rule.select or rule.statistics or rule.base_first:
        raise UserError(f"{where}: {method} cannot merge what the experts share: take linear, ties or passthrough")
    if rule.most == 1 and not rule.base:
        assert base is not None
        return (Slice((Source(base, None, {}, None),), None, {}, method),)
    experts = {expert.model: expert.parameters for expert in reversed(mixture.experts)}
    sources = tuple(Source(m, None, p, None) for m, p in reversed(experts.items()) if not (rule.base and m == base))
    return (Slice(sources, base if rule.base or rule.may_have_base else None, {}, method),)


def _slices(where: str, content: ModuleKeys, base: ModelSpec | None, method: str) -> tuple[Slice, ...]:
    if content.get("models"):
        sources = tuple(_source(where, s, ranged=False) for s in content["models"])
        return (Slice(sources, base, {}, method),)
    slices = []
    for part in content["slices"]:
        if not part.get("sources"):
            raise UserError(f"{where}: a slice has no sources")
        sources = tuple(_source(where, s, ranged=True) for s in part["sources"])
        lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
        if len(lengths) > 1:
            ranges = ", ".join(f"{s.model} {list(s.layers or ())}" for s in sources)
            raise UserError(f"{where}: the sources of a slice differ in their number of layers: {ranges}")
        own = parse_model(part["base_model"]) if part.get("base_model") else base
        named = _method(where, part.get("merge_method") or method)
        if RULES[named].select:
            raise UserError(f"{where}: {named} selects whole models: list them in models, not in slices")
        slices.append(Slice(sources, own, part.get("parameters") or {}, named))
    return tuple(slices)


def _source(where: str, raw: SourceKeys, *, ranged: bool) -> Source:
    if not raw.get("model"):
        raise UserError(f"{where}: an entry of {'sources' if ranged else 'models'} has no model")
    layers = raw.get("layer_range")
    if ranged != (layers is not None):
        need = "needs a layer_range [first, end]" if ranged else "has a layer_range: list it in slices"
        raise UserError(f"{where}: {raw['model']} {need}")
    if layers is not None and (len(layers) != 2 or not 0 <= layers[0] < layers[1]):
        raise UserError(f"{where}: layer_range={layers} of {raw['model']} is not [first, end] with first < end")
    span = (layers[0], layers[1]) if layers else None
    return Source(parse_model(raw["model"]), span, raw.get("parameters") or {}, raw.get("statistics"))
