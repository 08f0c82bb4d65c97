"""Helpers of configs: the empty groups, and the string argument after the colon in `--config=FILE.py:ARG`."""

from typing import Any

from ml_collections import ConfigDict

from lowrank import methods
from lowrank.core.config_schema import parse_argument

ADAPTER = "adapter"
GROUPS = ("model", "method", "data", "optim", "eval", "mesh", "checkpoint")


def new(**values: Any) -> ConfigDict:
    """A config with these values and with every group, empty if it is not given."""
    return ConfigDict({group: {} for group in GROUPS} | values)


def method(arg: str | None, default: str, **options: Any) -> dict[str, Any]:
    """`{"method": group, "notes": lines}` of a config for its argument: `method=` names it, other keys are its options.

    `options` are those of the `default` method. Another method keeps those that it has too; a note names the others.
    `method=adapter` is the method of `model.adapter`, with its options.
    """
    items = parse_argument(arg)
    name = items.pop("method", default)
    if name == ADAPTER:
        return {"method": items}
    kept = options if name == default else methods.shared_options(name, options)
    left_out = ", ".join(key for key in options if key not in {**kept, **items})
    note = f"method {name} does not take: {left_out} (options of {default}, the config's own method)"
    return {"method": {"name": name, **kept, **items}, "notes": (note,) if left_out else ()}
