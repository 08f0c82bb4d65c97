"""A context longer than the one of pre-training: a way to stretch rope to it is one value of the table."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lowrank.core.errors import UserError, plural, unknown
from lowrank.models.rope_scaling import KINDS, RopeScaling

Stretched = tuple[float, RopeScaling | None]  # (theta, scaling)


def _scaled(kind: str) -> Callable[[Any, float], Stretched]:
    def stretch(c: Any, factor: float) -> Stretched:
        original = {"original_positions": c.max_positions} if "original_positions" in KINDS[kind].fields else {}
        return c.rope_theta, RopeScaling(kind, factor, **original)

    return stretch


def _ntk(c: Any, factor: float) -> Stretched:
    """NTK-aware scaling: the lowest frequency is divided by the factor, the highest stays."""
    d = c.rotary_dim or c.head_dim
    if d < 4:
        raise UserError("model.rope=ntk needs more than one frequency: choose model.rope=linear")
    return c.rope_theta * factor ** (d / (d - 2)), None


def _abf(c: Any, factor: float) -> Stretched:
    """An adjusted base frequency (Xiong et al. 2023, arXiv:2309.16039): a larger theta, chosen freely."""
    del factor
    return c.context_theta, None


STRETCHES: dict[str, Callable[[Any, float], Stretched]] = {
    "linear": _scaled("linear"),
    "dynamic": _scaled("dynamic"),
    "yarn": _scaled("yarn"),
    "llama3": _scaled("llama3"),
    "ntk": _ntk,
    "abf": _abf,
}


def stretched_rope(c: Any) -> Stretched:
    """The theta and the scaling of the model of `c`, in the context that its options ask for."""
    if c.position_factor > 1:
        return c.rope_theta, RopeScaling("linear", c.position_factor)
    return STRETCHES[c.rope](c, c.context / c.max_positions) if c.context else (c.rope_theta, c.rope_scaling)


def as_own(c: Any) -> Any:
    """The config of a model that has the context of `c` by itself, without an option that asks for it."""
    if not c.context and c.position_factor == 1:
        return c
    theta, scaling = stretched_rope(c)
    # The original context of dynamic scaling is the one that a config names.
    positions = c.max_positions if scaling and scaling.kind == "dynamic" else c.max_length
    asked = {"context": 0, "rope": type(c).rope, "context_theta": 0.0, "position_factor": 1.0}
    return dataclasses.replace(c, max_positions=positions, rope_theta=theta, rope_scaling=scaling, **asked)


def check_context(c: Any) -> None:
    """Raises UserError for a context to which the rope of `c` cannot be stretched."""
    asked = f"context={c.context}" if c.context else f"position_factor={c.position_factor}"
    if c.rope not in STRETCHES:
        raise unknown("model.rope", c.rope, STRETCHES)
    if c.context_theta and not (c.context and c.rope == "abf"):
        raise UserError("model.context_theta is the theta of model.rope=abf with a model.context: leave it out")
    if not c.context and c.position_factor == 1:
        return
    if c.learned_positions or (c.rope_layers and not any(c.rope_layers)):
        raise UserError(f"model.{asked} stretches rope, and the model has none: leave it out")
    if c.context and c.position_factor > 1:
        raise UserError(f"model.{asked} and model.position_factor={c.position_factor} both stretch rope: leave one out")
    if c.rope_scaling:
        known = f"the rope of the base is scaled already, by {c.rope_scaling.kind!r}"
        raise UserError(f"{known}, and scalings do not stack: leave out model.{asked}")
    if c.context and c.context <= c.max_positions:
        has = plural(c.max_positions, "position")
        raise UserError(f"model.{asked} does not extend the base, which has {has}: leave it out")
    if c.context and c.rope == "abf" and c.context_theta <= c.rope_theta:
        raise UserError(
            f"model.rope=abf needs a theta above the base's {c.rope_theta}: set model.context_theta, "
            f"which is {c.context_theta}"
        )
