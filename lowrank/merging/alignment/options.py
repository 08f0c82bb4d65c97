"""The key `align` of a recipe."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import numpy as np

from lowrank.core.errors import UserError, nearest, unknown
from lowrank.merging.alignment import matching, transport
from lowrank.merging.alignment.matching import Layer

Moves = tuple[np.ndarray, np.ndarray]  # of what the units of an MLP read, and of what they write


@dataclasses.dataclass(frozen=True)
class Method:
    """How the units of MLPs are moved: `match(reference, model, regularization)` finds the moves.

    A method that `mixes` units takes a regularization, and models whose MLPs have other widths.
    """

    match: Callable[[Layer, Layer, float], Moves]
    mixes: bool = False


def _permute(reference: Layer, model: Layer, regularization: float) -> Moves:
    del regularization  # refused by `read_align`
    order = matching.match_units(reference, model)
    return order, order


METHODS = {"matching": Method(_permute), "transport": Method(transport.match_units, mixes=True)}


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

    @property
    def units(self) -> Method:
        """The method, for the units of MLPs; heads are always matched."""
        return METHODS[self.method]


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
    if options.regularization and not options.units.mixes:
        mixing = " or ".join(name for name, method in METHODS.items() if method.mixes)
        raise UserError(f"{where}: align.regularization is for method: {mixing}, and the method is {options.method}")
    return options
