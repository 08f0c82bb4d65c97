"""Config groups become dataclasses or keyword arguments here, so that a misspelt key is an error."""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lowrank.core.errors import UserError, unknown

T = TypeVar("T")
UNIONS = (typing.Union, types.UnionType)
ANYTHING = (Any, inspect.Parameter.empty)


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
    """Raises UserError for a value that is not what its annotation declares; an int will do for a float."""
    if not _fits(kind, value):
        raise UserError(f"{where} must be {_spell(kind)}, not {_plain(value)!r}")


def _fits(kind: Any, value: Any) -> bool:
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in UNIONS:
        return any(_fits(arg, value) for arg in args)
    if origin is Mapping:
        return _is_group(value) and all(_fits(args[1], v) for v in dict(value).values())
    if origin in (tuple, Sequence):
        return isinstance(value, list | tuple) and _items_fit(args, value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return kind in ANYTHING or not isinstance(kind, type) or isinstance(value, kind)


def _items_fit(kinds: tuple[Any, ...], values: Sequence[Any]) -> bool:
    if len(kinds) < 2 or kinds[1] is ...:  # `tuple`, `Sequence[a]`, `tuple[a, ...]`: all are alike
        return all(_fits(kinds[0] if kinds else Any, value) for value in values)
    return len(kinds) == len(values) and all(map(_fits, kinds, values))


def _spell(kind: Any) -> str:
    if typing.get_origin(kind) in UNIONS:
        return " or ".join(map(_spell, typing.get_args(kind)))
    if typing.get_args(kind):  # tuple[str, ...], Mapping[str, Any]
        return f"a {re.sub(r'[a-z]+[.]', '', str(kind))}"
    return {int: "an int", type(None): "None"}.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def _plain(value: Any) -> Any:
    """ConfigDict -> dict and list -> tuple, so that dataclasses stay hashable."""
    if _is_group(value):
        return {k: _plain(v) for k, v in dict(value).items()}
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value


def replace(instance: T, group: Mapping[str, Any], where: str) -> T:
    """`dataclasses.replace(instance, **group)` with the same checks."""
    fields = {f.name: f.type for f in dataclasses.fields(instance)}
    for key in group:
        if key not in fields:
            raise unknown("config key", f"{where}.{key}", [f"{where}.{k}" for k in fields])
        _check_type(fields[key], group[key], f"{where}.{key}")
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
