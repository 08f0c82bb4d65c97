"""The method of a run that trains an adapter further: that of the adapter, with which the run's config must agree."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.core.errors import UserError
from lowrank.core.files import to_json
from lowrank.methods import ALSO, METHODS, build_method

PATTERNS = ("target", "also_train")  # options that are regexes: two of them may match the same weights
LEAVE_OUT = "leave it out, as CONFIG.py:method=adapter does"


def agreed_group(given: Mapping[str, Any], own: Mapping[str, Any], where: str, known: bool = True) -> dict[str, Any]:
    """The method's group of a run that trains an adapter of the group `own` further; `where` names the adapter.

    What `given`, the config's group, leaves out is that of the adapter. A pattern of `given` takes the place of the
    adapter's: `check_patterns` compares what both match. Where the adapter's settings are not `known`, those of `given`
    are taken. Raises UserError, with both values, for another method or setting.
    """
    name = given.get("name", own["name"])
    if name != own["name"]:
        more = f"set model.start=merge, which begins {name} on the base with the adapter merged into it"
        raise UserError(f"method.name={name} in the config, and {where} is of {own['name']}: {LEAVE_OUT}, or {more}")
    build_method({**own, **given})  # raises UserError for an unknown key
    for key in differing(given, own) if known else ():
        if key not in PATTERNS:
            theirs = _value(own, key)
            raise UserError(
                f"method.{key}={given[key]!r} in the config, and {where} has {theirs!r}: {LEAVE_OUT}, or set "
                "model.start=merge, which begins anew on the base with the adapter merged into it"
            )
    return {**own, **given}


def differing(given: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The options of `given` whose values are not those of `own`, or the method's defaults."""
    return [key for key in given if key != "name" and to_json(given[key]) != to_json(_value(own, key))]


def check_same_leaves(given: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises UserError for the first leaf that only one of two methods has, or that they give other shapes.

    Both map the names of leaves to their shapes: `given` are those of the run, `own` those of the adapter.
    """
    for name in [*own, *given]:
        ours, theirs = (_spell(shapes.get(name)) for shapes in (given, own))
        if ours != theirs:
            raise UserError(
                f"{name} is {ours} by the run's method, and {theirs} in {where}: leave method.target out, which takes "
                "the adapter's, or set model.start=merge"
            )


def _value(own: Mapping[str, Any], key: str) -> Any:
    """The value of an option of a method's group, or its default."""
    if key in own:
        return own[key]
    return () if key in ALSO else inspect.signature(METHODS[own["name"]]).parameters[key].default


def _spell(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))
