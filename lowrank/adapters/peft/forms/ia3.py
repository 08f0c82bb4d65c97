"""(IA)^3 in PEFT's format: one vector per module, and the list of the modules that scale their inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms.form import WHERE, Layer, Part, PeftForm, Settings
from lowrank.core.errors import UserError
from lowrank.core.typing import HostArrays
from lowrank.weights.scaled import Scaled


def _peel_scaled(w: Scaled, arrays: HostArrays) -> Layer:
    return Layer({"feedforward": w.side == "in"}, {"s": arrays["s"]})


def _grow_scaled(base: Any, layers: Sequence[Layer | None]) -> Scaled:
    sides = {"in" if layer.settings["feedforward"] else "out" for layer in layers if layer}
    if len(sides) > 1:
        raise UserError("feedforward_modules names only some layers of a stack: it must name all or none")
    (side,) = sides
    s = np.ones((len(layers), base.shape[-1 if side == "out" else -2]), np.float32)
    for i, layer in enumerate(layers):
        if layer:
            s[i] = layer.arrays["s"]
    return Scaled(base=base, s=jnp.asarray(s.reshape(*base.shape[:-2], -1)), side=side)


def _ia3_settings(config: Mapping[str, Any], path: str) -> Settings:
    names = config["feedforward_modules"]
    if names is None:
        raise UserError("the adapter's feedforward_modules is missing, although IA3 needs it")
    if isinstance(names, str):
        return {"feedforward": match.is_named(names, path)}
    return {"feedforward": any(path.endswith(name) for name in names)}  # PEFT does not require a dot before the name


def _ia3_summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    """The JSON; PEFT requires every entry of `feedforward_modules` among the `target_modules`."""
    del method
    inner = [path for path, s in modules.items() if s["feedforward"]]
    outer = [path for path in modules if path not in inner]
    inner_names = match.shortest_ends(inner, [*outer, *others])
    if any(path.endswith(name) for name in inner_names for path in outer):
        inner_names = sorted(inner)
    outer_names = match.shortest_ends(outer, [*inner, *others])
    return {
        "target_modules": sorted({*inner_names, *outer_names}),
        "feedforward_modules": inner_names,
        "init_ia3_weights": True,
    }


_IA3_L = Part(".ia3_l", "s", lambda n_in, n_out, s: (1, n_in) if s["feedforward"] else (n_out, 1), vector=True)

IA3 = PeftForm(
    peft_type="IA3",
    kind=Scaled,
    parts=(_IA3_L,),
    flags={},
    obeyed_keys={**WHERE, "feedforward_modules": None},
    ignored_keys=("fan_in_fan_out", "init_ia3_weights"),
    supported={},
    settings=_ia3_settings,
    to_layer=_peel_scaled,
    from_layers=_grow_scaled,
    summary=_ia3_summary,
)
