"""Config groups become dataclasses or keyword arguments here, so that a misspelt key is an error."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lowrank.errors import UserError, unknown

T = TypeVar("T")


def call(fn: Callable[..., T], group: Mapping[str, Any], where: str) -> T:
    """`fn(**group)`; an unknown, missing or mistyped key raises UserError naming it and the nearest valid one.

    A function that takes `**kwargs` hands them on to one that does not, and that one checks them.
    """
    parameters = inspect.signature(fn).parameters
    passes_on = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    parameters = {k: p for k, p in parameters.items() if p.kind != p.VAR_KEYWORD}
    for key in group:
        if key not in parameters and not passes_on:
            raise unknown("config key", f"{where}.{key}", [f"{where}.{k}" for k in parameters])
        if key in parameters:
            _check_type(parameters[key].annotation, group[key], f"{where}.{key}")
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in group]
    if missing:
        raise UserError(f"{where}.{missing[0]} is required")
    return fn(**{k: _plain(v) for k, v in group.items()})


def _check_type(kind: Any, value: Any, where: str) -> None:
    """Numbers, words and switches must be what they are declared to be; an int will do for a float."""
    accepted = {bool: bool, int: int, float: int | float, str: str}.get(kind)
    if accepted and (not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)):
        raise UserError(f"{where} must be a {kind.__name__}, not {value!r}")


def _plain(value: Any) -> Any:
    """ConfigDict -> dict and list -> tuple, so that dataclasses stay hashable."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {k: _plain(v) for k, v in dict(value).items()}
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def replace(instance: T, group: Mapping[str, Any], where: str) -> T:
    """`dataclasses.replace(instance, **group)` with the same checks."""
    fields = [f.name for f in dataclasses.fields(instance)]
    for key in group:
        if key not in fields:
            raise unknown("config key", f"{where}.{key}", [f"{where}.{k}" for k in fields])
    return dataclasses.replace(instance, **{k: _plain(v) for k, v in group.items()})


def parse(arg: str | None) -> dict[str, Any]:
    """`'method=dora,rank=4'` -> `{'method': 'dora', 'rank': 4}`. Values are Python literals, else strings."""
    items = {}
    for item in filter(None, (arg or "").split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"config argument {item!r} is not KEY=VALUE")
        items[key.strip()] = _literal(value.strip())
    return items


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text, text)
