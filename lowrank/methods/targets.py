"""Checks of the weights that a method targets, and one rank or alpha per layer of a stack."""

import re
from collections.abc import Mapping
from typing import Any

from lowrank.core.errors import UserError


def check_positive(**values: float) -> None:
    """Raises UserError for an option of the method that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"method.{name} must be positive, not {value}")


def check_fraction(**values: float) -> None:
    """Raises UserError for an option of the method that is not in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"method.{name} must be in [0, 1), not {value}")


def count_steps(given: float, total: int) -> int:
    """The number of steps of `given`: a number of steps or, below 1, a share of the `total` steps."""
    return round(given * total if given < 1 else given)


TABLE = "embed/embedding"


def check_kernel(name: str) -> None:
    """Raises UserError for a target that is not a kernel."""
    if not name.endswith("kernel"):
        raise UserError(f"{name} is not a kernel: only kernels [..., in, out] take this update, change the target")


def check_rank(name: str, shape: tuple[int, ...], rank: int, tables: bool = False) -> None:
    """Raises UserError for a rank above min(in, out), and for what is no kernel, nor, with `tables`, the embedding."""
    if not (tables and name == TABLE):
        check_kernel(name)
    if rank > min(shape[-2:]):
        raise UserError(f"rank {rank} is larger than min(in, out) = {min(shape[-2:])} of {name}")


def check_ranks(rank: int, alpha: float, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    """Raises UserError for a rank or an alpha that is not positive, and for a rank of a pattern that is negative."""
    check_positive(rank=rank, alpha=alpha)
    check_positive(**{f"alpha_pattern[{k!r}]": v for k, v in alphas.items()})
    for pattern, value in ranks.items():
        if value < 0:
            raise UserError(f"method.rank_pattern[{pattern!r}] must not be negative, not {value}")


def ranks(
    name: str, shape: tuple[int, ...], default: int, patterns: Mapping[str, int], tables: bool = False
) -> list[int]:
    """The rank of each layer of a stack, or of the one kernel. Raises UserError as `check_rank` does."""
    found = per_layer(name, shape, default, patterns)
    check_rank(name, shape, max(found), tables)
    if max(found) == 0:
        raise UserError(f"every layer of {name} has rank 0: leave it out of the target")
    return found


def layer_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """The name of the weight and, for a stack `[layers, ...]`, one name per layer, its index after the first part."""
    first, _, rest = name.partition("/")
    return [name] + ([f"{first}/{i}/{rest}" for i in range(shape[0])] if len(shape) > 2 else [])


def per_layer(name: str, shape: tuple[int, ...], default: Any, patterns: Mapping[str, Any]) -> list[Any]:
    """One value per layer of a stack, or for the one kernel: that of the last pattern that matches, or the default."""

    def value(names: tuple[str, ...]) -> Any:
        hits = [v for p, v in patterns.items() if any(re.fullmatch(p, n) for n in names)]
        return hits[-1] if hits else default

    whole, *layers = layer_names(name, shape)
    return [value((whole, layer)) for layer in layers] or [value((whole,))]
