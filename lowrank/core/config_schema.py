"""Config groups as dataclasses and keyword arguments: a misspelt key or a value of the wrong type is an error."""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from lowrank.core.errors import UserError, unknown

T = TypeVar("T")
UNIONS = (typing.Union, types.UnionType)
ANYTHING = (Any, inspect.Parameter.empty)


def call_with_group(fn: Callable[..., T], group: Mapping[str, Any], where: str) -> T:
    """`fn(**group)`; an unknown, missing or mistyped key raises UserError naming it and the nearest valid one.

    A function that takes `**kwargs` passes them to a function without, which checks them.
    """
    signature = inspect.signature(fn).parameters
    passes_on = any(p.kind == p.VAR_KEYWORD for p in signature.values())
    parameters = {k: p for k, p in signature.items() if p.kind != p.VAR_KEYWORD}
    for key in group:
        if key not in parameters and not passes_on:
            raise unknown("config key", f"{where}.{key}", [f"{where}.{k}" for k in parameters])
        if key in parameters:
            check_type(parameters[key].annotation, group[key], f"{where}.{key}")
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in group]
    if missing:
        raise UserError(f"{where}.{missing[0]} is missing: the config must set it")
    return fn(**{k: _plain(v) for k, v in group.items()})


def check_type(kind: Any, value: Any, where: str) -> None:
    """Raises UserError for a value that is not of the annotated type; an int is accepted for a float."""
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
    if len(kinds) < 2 or kinds[1] is ...:  # `tuple`, `Sequence[a]`, `tuple[a, ...]`: one type for all items
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


def replace_fields(instance: T, group: Mapping[str, Any], where: str) -> T:
    """`dataclasses.replace(instance, **group)` of a dataclass, with the checks of `call_with_group`."""
    fields = {f.name: f.type for f in dataclasses.fields(cast(Any, instance))}
    for key in group:
        if key not in fields:
            raise unknown("config key", f"{where}.{key}", [f"{where}.{k}" for k in fields])
        check_type(fields[key], group[key], f"{where}.{key}")
    return dataclasses.replace(cast(Any, instance), **{k: _plain(v) for k, v in group.items()})


def parse_argument(arg: str | None) -> dict[str, Any]:
    """`'method=dora,rank=4'` -> `{'method': 'dora', 'rank': 4}`. Values are Python literals or strings."""
    items = {}
    for item in filter(None, (arg or "").split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"config argument {item!r} is not of the form KEY=VALUE")
        items[key.strip()] = _literal(value.strip())
    return items


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text, text)
