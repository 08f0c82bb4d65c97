"""The common parts of forms with a rank: patterns of ranks and alphas, and stacks padded to the largest rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms.form import Layer, Settings
from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays

READS = {"r": 8, "rank_pattern": {}, "layers_to_transform": None, "layers_pattern": None}


def positive_number(config: Mapping[str, Any], path: str, what: str, key: str, kind: Any = int) -> Any:
    """The rank or alpha of a module: the value of the first pattern that matches it, or the `key` of the JSON.

    Raises UserError for a value that is not a positive number.
    """
    value = match.pattern_value(config.get(f"{what}_pattern") or {}, path, config[key])
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**53:
        raise UserError(f"the adapter's {what} for {path} is {value!r}: it must be a positive number")
    return value


def rank_settings(config: Mapping[str, Any], path: str) -> Settings:
    """`r` and `scale = alpha / r` of a module, for forms whose JSON has `alpha`."""
    rank = positive_number(config, path, "rank", "r")
    return {"r": rank, "scale": positive_number(config, path, "alpha", "alpha", int | float) / rank}


def rank_summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    """The JSON of modules whose settings are `r` and `scale`."""
    del method
    rank, ranks = match.split_default({path: s["r"] for path, s in modules.items()})
    alpha, alphas = match.split_default({path: undo_rounding(s["scale"] * s["r"]) for path, s in modules.items()})
    return {
        "target_modules": match.shortest_ends(modules, others),
        "r": rank,
        "rank_pattern": ranks,
        "alpha": alpha,
        "alpha_pattern": alphas,
    }


def undo_rounding(x: float) -> float | int:
    """The number of five digits that float32 rounded to `x`, if there is one, else `x`."""
    near = float(f"{x:.5g}")
    x = near if abs(near - x) <= 1e-6 * abs(x) else x
    return int(x) if x == int(x) else x


def nonzero_ranks(arrays: HostArrays, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """The ranks that are not padding, `[r]` bool: a column of `a` or a row of `b` of any pair is not zero."""
    return np.any([np.any(arrays[a], axis=0) | np.any(arrays[b], axis=1) for a, b in pairs], axis=0)


def stack_layers(base: Any, layers: Sequence[Layer | None], field: str, shape: tuple[int, ...]) -> jax.Array:
    """The layers' arrays of one field as `[..., *shape]`, padded with zeros; zeros for a missing layer."""
    out = np.zeros((len(layers), *shape), np.float32)
    for i, layer in enumerate(layers):
        if layer:
            array = np.asarray(layer.arrays[field])
            out[(i, *map(slice, array.shape))] = array
    return jnp.asarray(out.reshape(*base.shape[:-2], *shape))


def stack_scales(base: Any, layers: Sequence[Layer | None]) -> jax.Array:
    """The layers' scales `[...]`; 1 for a missing layer."""
    values = np.array([layer.settings["scale"] if layer else 1.0 for layer in layers], np.float32)
    return jnp.asarray(values.reshape(base.shape[:-2]))
