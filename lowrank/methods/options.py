"""The options of a method by name: the signature of a method that builds on another one, and the options of both."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lowrank.core.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
OWN = "own_options"  # the attribute of a method's function that `own_meaning` sets


def with_options_of(base: Callable[..., Any], without: Sequence[str] = ()) -> Callable[[F], F]:
    """Decorator of a method that passes its `**kwargs` to `base`: its signature lists the options of both.

    `without` are the options of `base` that the method refuses.
    """

    def decorate(fn: F) -> F:
        signature = inspect.signature(fn)
        own, kwargs = _split(signature)
        keyword = inspect.Parameter.KEYWORD_ONLY
        more = [p.replace(kind=keyword) for p in _split(inspect.signature(base))[0] if p.name not in without]
        names = {p.name for p in own}
        parameters = [*own, *(p for p in more if p.name not in names), *kwargs]
        fn.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return fn

    return decorate


def _split(signature: inspect.Signature) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """`(named parameters, the parameter **kwargs if there is one)`."""
    parameters = signature.parameters.values()
    named = [p for p in parameters if p.kind != p.VAR_KEYWORD]
    return named, [p for p in parameters if p.kind == p.VAR_KEYWORD]


def own_meaning(*names: str) -> Callable[[F], F]:
    """Decorator of a method whose options `names` mean something else than the options of that name elsewhere."""

    def decorate(fn: F) -> F:
        setattr(fn, OWN, names)
        return fn

    return decorate


def check_unused(method: Callable[..., Any], needs: str, **options: Any) -> None:
    """Raises UserError for an option of `method` that is not at its default, where only `needs` would let it act."""
    for name, value in options.items():
        if value != inspect.signature(method).parameters[name].default:
            raise UserError(f"method.{name}={value} acts only with {needs}: set that too, or leave method.{name} out")


def common_options(method: Callable[..., Any]) -> list[str]:
    """The names of the options that keep their value where a config's method is replaced by `method`."""
    own = getattr(method, OWN, ())
    return [p.name for p in _split(inspect.signature(method))[0] if p.name not in own]
