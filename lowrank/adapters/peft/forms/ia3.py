"""(IA)^3 in PEFT's format."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms.form import WHERE, Form, Layer, Part, Settings
from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.weights.scaled import Scaled


def _peel_scaled(w: Scaled, arrays: HostArrays) -> Layer:
    return Layer({"feedforward": w.side == "in"}, {"s": arrays["s"]})


def _grow_scaled(base: Any, layers: Sequence[Layer | None]) -> Scaled:
    sides = {"in" if layer.settings["feedforward"] else "out" for layer in layers if layer}
    if len(sides) > 1:
        raise UserError("feedforward_modules names some layers of a stack and not others")
    (side,) = sides
    s = np.ones((len(layers), base.shape[-1 if side == "out" else -2]), np.float32)
    for i, layer in enumerate(layers):
        if layer:
            s[i] = layer.arrays["s"]
    return Scaled(base=base, s=jnp.asarray(s.reshape(*base.shape[:-2], -1)), side=side)


def _ia3_settings(config: Mapping[str, Any], path: str) -> Settings:
    names = config["feedforward_modules"]
    if names is None:
        raise UserError("the adapter's feedforward_modules is missing")
    if isinstance(names, str):
        return {"feedforward": match.named(names, path)}
    return {"feedforward": any(path.endswith(name) for name in names)}  # here PEFT asks for no dot before the name


def _ia3_summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    """PEFT wants every entry of `feedforward_modules` among the `target_modules`."""
    del method
    inner = [path for path, s in modules.items() if s["feedforward"]]
    outer = [path for path in modules if path not in inner]
    inner_names = match.ends(inner, [*outer, *others])
    if any(path.endswith(name) for name in inner_names for path in outer):
        inner_names = sorted(inner)
    outer_names = match.ends(outer, [*inner, *others])
    return {
        "target_modules": sorted({*inner_names, *outer_names}),
        "feedforward_modules": inner_names,
        "init_ia3_weights": True,
    }


_IA3_L = Part(".ia3_l", "s", lambda n_in, n_out, s: (1, n_in) if s["feedforward"] else (n_out, 1), vector=True)

IA3 = Form(
    peft_type="IA3",
    kind=Scaled,
    parts=(_IA3_L,),
    flags={},
    reads={**WHERE, "feedforward_modules": None},
    ignores=("fan_in_fan_out", "init_ia3_weights"),
    only={},
    settings=_ia3_settings,
    peel=_peel_scaled,
    grow=_grow_scaled,
    summary=_ia3_summary,
)
