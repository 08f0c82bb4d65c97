"""What configs share: the empty groups, and the string argument after the colon in `--config=FILE.py:ARG`."""

from typing import Any

from ml_collections import ConfigDict

from lowrank.core.config_schema import parse_argument

GROUPS = ("model", "method", "data", "optim", "eval", "mesh", "checkpoint")


def new(**values: Any) -> ConfigDict:
    """A config with these values and every group, empty if not given; a group's options are in the class it becomes."""
    return ConfigDict({group: {} for group in GROUPS} | values)


def method(arg: str | None, default: str, **options: Any) -> dict[str, Any]:
    """The method group for a config's argument: `method=` names it, the other keys are its options.

    `options` are those of the `default` method, and hold for no other.
    """
    items = parse_argument(arg)
    name = items.pop("method", default)
    return {"name": name, **(options if name == default else {}), **items}
