"""A rule of merging as a value: a function of one tensor of every model, and the options that it has.

N is the number of models that are merged, without the base.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank.core.errors import UserError, plural, unknown
from lowrank.merging.factors import Factors

PRESETS = ("mergekit", "paper", "peft")  # whose defaults the options of a rule have
REQUIRED: Any = object()  # the default of an option that has none
Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a rule. `check` returns the value, and raises UserError, which names it, for a wrong one.

    With `per_model`, each model has a value of its own. `whole`: the value is that of all tensors, as a rule reads it
    before the first one.
    """

    check: Callable[[str, Any], Any]
    default: Any = REQUIRED
    per_model: bool = False
    whole: bool = False


@dataclasses.dataclass
class Group:
    """One tensor of every model, under its Hugging Face name and in its layout there.

    A rule may overwrite `base` and `tensors`, which are in float32 or wider. `own[i]` are the options of model i.
    """

    name: str
    base: np.ndarray | None
    tensors: list[np.ndarray]
    shared: Values
    own: Sequence[Values]
    seed: int = 0
    survey: Any = None  # what `Rule.survey` returned
    statistics: Sequence[Mapping[str, np.ndarray]] = ()  # of each model, by the names that `Rule.statistics` asks for
    input_axis: int = 1  # the axis of a matrix that runs along its inputs
    kept: list[float] = dataclasses.field(default_factory=list)  # share of each task vector that a rule left, set by it


Groups = Callable[[], Any]  # an iterator over the groups of all tensors, as often as it is called


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of merging.

    `merge` returns the merged tensor in float32 or wider. `base`: the rule is defined on task vectors, the differences
    from a base; with `may_have_base`, on these where there is a base, else on the models. `task_coefficients(shared,
    own)` are the coefficients of the task vectors, for a rule that is linear in them whatever they are: such a rule
    acts on the factors of adapters. `survey(groups, shared, own)` reads all tensors before the first is merged.
    `check(shared, own)` raises UserError for values that do not go together. `select(count, score)` chooses models by
    the held-out score of their mean.
    """

    merge: Callable[[Group], np.ndarray]
    options: Mapping[str, Option]
    presets: Mapping[str, Values] = dataclasses.field(default_factory=dict)  # defaults of a preset, where these differ
    base: bool = False
    may_have_base: bool = False
    base_first: bool = False  # the base, if there is one, is the first of the models
    least: int = 1
    most: int | None = None
    task_coefficients: Callable[[Values, Sequence[Values]], list[float]] | None = None
    survey: Callable[[Groups, Values, Sequence[Values]], Any] | None = None
    surveys: Callable[[Values], bool] = lambda shared: False
    check: Callable[[Values, Sequence[Values]], None] | None = None
    select: Callable[[int, Callable[[tuple[int, ...]], float]], tuple[int, ...]] | None = None
    merge_factors: Callable[[Values, Sequence[np.ndarray], Sequence[Factors | None]], Factors] | None = None
    statistics: str = ""  # the statistics of each tensor that the rule needs; "": none

    def default(self, name: str, preset: str) -> Any:
        """The default of an option, REQUIRED if it has none."""
        return self.presets.get(preset, {}).get(name, self.options[name].default)

    def check_count(self, rule: str, count: int) -> None:
        """Raises UserError when `count` models are too few or too many."""
        if count < self.least or (self.most is not None and count > self.most):
            bound = f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"
            allowed = f"exactly {self.least}" if self.least == self.most else bound
            raise UserError(f"{rule} merges {allowed} of them, and the recipe lists {plural(count, 'model')}")


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{name}={value!r}: it must be a number")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A positive number."""
    if not number(name, value) > 0:
        raise UserError(f"{name}={value!r}: it must be positive")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A number in (0, 1]."""
    if not 0 < number(name, value) <= 1:
        raise UserError(f"{name}={value!r} is outside of (0, 1]")
    return float(value)


def share(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    if not 0 <= number(name, value) <= 1:
        raise UserError(f"{name}={value!r} is outside of [0, 1]")
    return float(value)


def count(name: str, value: Any) -> int:
    """A whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r}: it must be a whole number, at least 1")
    return value


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: it must be true or false")
    return value


def choice(*names: str) -> Callable[[str, Any], str]:
    """One of the names."""

    def check(name: str, value: Any) -> str:
        if value not in names:
            raise unknown(f"{name}:", str(value), names)
        return value

    return check


def weights(own: Sequence[Values]) -> list[float]:
    """The weight of each model."""
    return [values["weight"] for values in own]


def check_divisor(shared: Values, own: Sequence[Values]) -> None:
    """Raises UserError for weights whose sum cannot divide: one of them is negative, or the sum is zero."""
    if shared["divisor"] == "none":
        return
    if (least := min(weights(own))) < 0:
        raise UserError(
            f"weight={least} is negative, and divisor={shared['divisor']} cancels its sign: set normalize: false"
        )
    if abs(sum(weights(own))) < 1e-8:
        raise UserError("the weights sum to zero: give one of them a positive weight")


WEIGHT = Option(number, per_model=True)
DIVISOR = choice("weight", "none")
