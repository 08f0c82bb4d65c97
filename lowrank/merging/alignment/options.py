"""The key `align` of a recipe."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

from lowrank.core.errors import UserError, nearest, unknown

METHODS = ("matching", "transport")


class AlignKeys(TypedDict, total=False):
    """What the key `align` holds."""

    method: str
    regularization: float
    residual: bool


@dataclasses.dataclass(frozen=True)
class Options:
    """How models are aligned to the base or the first model: `matching` of weights, or `transport` of MLPs' units."""

    method: str = "matching"
    regularization: float = 0.0
    residual: bool = False


def read_align(where: str, raw: Mapping[str, Any] | None) -> Options | None:
    """The options in a recipe, None without them. Raises UserError naming the key."""
    if raw is None:
        return None
    for key in raw:
        if key not in AlignKeys.__annotations__:
            raise UserError(
                f"{where}: align: the key {key!r} is not supported{nearest(key, AlignKeys.__annotations__)}"
            )
    options = Options(**raw)
    if options.method not in METHODS:
        raise unknown(f"align.method in {where}:", options.method, METHODS)
    if options.regularization < 0:
        raise UserError(f"{where}: align.regularization={options.regularization} is negative")
    if options.regularization and options.method != "transport":
        raise UserError(f"{where}: align.regularization is for method: transport, and the method is {options.method}")
    return options
