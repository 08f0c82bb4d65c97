"""The values of a rule's options for one tensor: filters, curves over layers, and their precedence."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lowrank.core.errors import UserError, nearest, unknown
from lowrank.merging.rule import REQUIRED, Option, Rule

Parameters = Mapping[str, Any]
IGNORED = ("int8_mask",)  # it changes how mergekit stores masks, not the result


def check_names(rules: Mapping[str, Rule], parameters: Parameters, *, per_model: bool) -> None:
    """Raises UserError for a parameter that all rules lack, or that cannot differ from one model to the next."""
    options = {name: option for rule in rules.values() for name, option in rule.options.items()}
    known = [*options, *(["normalize"] if "divisor" in options else ())]
    for name in parameters:
        if name not in known and name not in IGNORED:
            raise unknown(f"parameter of {' and '.join(rules)}:", name, known)
        if per_model and name in options and not options[name].per_model:
            raise UserError(
                f"{name} is a parameter of the whole merge, and is given for one model: move it out of models"
            )
        if name == "normalize" and "divisor" in parameters:
            raise UserError("normalize and divisor both set the divisor: leave out normalize")


def evaluate(setting: Any, name: str, u: float) -> Any:
    """The value of a setting for the tensor `name` at `u`: 0 is the first layer, 1 the last. None: no filter fits.

    A setting is a value, a list of values along the layers, or a list of `{filter, value}`, of which the first whose
    filter is in the name counts.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _as_number(setting)
    if all(isinstance(item, Mapping) for item in setting):
        for item in setting:
            if not isinstance(item.get("filter", "*"), str | None):
                raise UserError(f"the filter {item['filter']!r} is not text, a part of a tensor's name: quote it")
        fits = (item for item in setting if item.get("filter") in (None, "*") or item["filter"] in name)
        match = next(fits, None)
        return None if match is None else evaluate(match.get("value"), name, u)
    values = [_as_number(value) for value in setting]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return values[int(u * (len(values) - 1))]
    place = u * (len(values) - 1)
    first = min(int(place), len(values) - 1)
    second = min(first + 1, len(values) - 1)
    return values[first] + (place - first) * (values[second] - values[first])


def _as_number(value: Any) -> Any:
    """YAML reads `1e-5` as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def filters(setting: Any) -> Iterator[str]:
    """The filters of a setting."""
    for item in setting if isinstance(setting, list) else [setting]:
        if isinstance(item, Mapping) and item.get("filter") not in (None, "*"):
            yield item["filter"]


def check_filters(parameters: Sequence[Parameters], names: Collection[str]) -> None:
    """Raises UserError for a filter that is in none of the tensors' names, and for an item that is not a filter."""
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    for scope in parameters:
        for name, setting in scope.items():
            for item in setting if isinstance(setting, list) else [setting]:
                if isinstance(item, Mapping) and (not item.keys() <= {"filter", "value"} or "value" not in item):
                    raise UserError(
                        f"{name}: an item of a list of filters has the keys filter and value, not {list(item)}"
                    )
            for text in filters(setting):
                if not any(text in tensor for tensor in names):
                    raise UserError(f"the filter {text!r} of {name} matches no tensor{nearest(text, parts)}")


def resolve(
    rule: Rule, preset: str, scopes: Sequence[Parameters], tensor: str, u: float, *, per_model: bool
) -> dict[str, Any]:
    """The options of one model, or those of all, for one tensor. The first of `scopes` that has a value gives it.

    Raises UserError, which names the tensor, for a value that an option refuses and for one that is required.
    """
    values = {}
    for name, option in rule.options.items():
        if option.per_model == per_model:
            value = _find(name, scopes, tensor, u)
            if value is None:
                value = rule.default(name, preset)
            if value is REQUIRED:
                raise UserError(f"parameter {name!r} has no value for {tensor}: give it one under parameters")
            values[name] = _checked(option, name, _in_full(rule, preset, name, value), tensor)
    return values


def _find(name: str, scopes: Sequence[Parameters], tensor: str, u: float) -> Any:
    for scope in scopes:
        if name in scope and (value := evaluate(scope[name], tensor, u)) is not None:
            return value
        if name == "divisor" and "normalize" in scope:
            value = evaluate(scope["normalize"], tensor, u)
            if value is not None:
                return value
    return None


def _in_full(rule: Rule, preset: str, name: str, value: Any) -> Any:
    """mergekit's `normalize: true` or `rescale: false` as the value that the option has."""
    if name not in ("divisor", "rescale") or not isinstance(value, bool):
        return value
    usual = rule.default(name, preset)
    on = {"divisor": "weight", "rescale": "l1"}[name] if usual == "none" else usual
    return on if value else "none"


def _checked(option: Option, name: str, value: Any, tensor: str) -> Any:
    try:
        return option.check(name, value)
    except UserError as e:
        raise UserError(f"{e} (for {tensor})") from None
