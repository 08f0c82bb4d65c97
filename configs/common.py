"""What configs share: the empty groups, and the string argument after the colon in `--config=FILE.py:ARG`."""

import ast
from typing import Any

from ml_collections import ConfigDict

from lowrank.errors import UserError

GROUPS = ("model", "method", "data", "optim", "eval", "mesh", "checkpoint")


def new(**values: Any) -> ConfigDict:
    """A config with these values and every group, empty if not given; a group's options are in the class it becomes."""
    return ConfigDict({group: {} for group in GROUPS} | values)


def parse(arg: str | None) -> dict[str, Any]:
    """`'method=dora,rank=4'` -> `{'method': 'dora', 'rank': 4}`. Values are Python literals, else strings."""
    items = {}
    for item in filter(None, (arg or "").split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"config argument {item!r} is not KEY=VALUE")
        items[key.strip()] = _literal(value.strip())
    return items


def method(arg: str | None, default: str, **options: Any) -> dict[str, Any]:
    """The method group for a config's argument: `method=` names it, the other keys are its options.

    `options` are those of the `default` method, and hold for no other.
    """
    items = parse(arg)
    name = items.pop("method", default)
    return {"name": name, **(options if name == default else {}), **items}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text, text)
