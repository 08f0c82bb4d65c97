"""AdaLoRA in PEFT's format: only the triplets that were not pruned are stored, and `rank_pattern` marks them.

PEFT divides alpha by the initial rank plus 1e-5, however many triplets were pruned.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank.adapters.peft import match
from lowrank.adapters.peft.forms import ranked
from lowrank.adapters.peft.forms.form import Layer, Part, PeftForm, Settings
from lowrank.adapters.peft.forms.lora import LORA
from lowrank.core.errors import UserError, plural
from lowrank.core.typing import HostArrays
from lowrank.weights.adalora import AdaLoRA

EPSILON = 1e-5
KEPT = "{}.lora_E"  # a module's key in rank_pattern


def _settings(config: Mapping[str, Any], path: str) -> Settings:
    rank, alpha = config["init_r"], config["lora_alpha"]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < 2**53:
        raise UserError(f"the adapter's init_r is {rank!r}: it must be a positive number")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 2**53:
        raise UserError(f"the adapter's lora_alpha is {alpha!r}: it must be a number")
    scale = (alpha if alpha > 0 else rank) / (rank + EPSILON)
    settings = {"r": rank, "kept": None, "scale": scale, "dropout": config["lora_dropout"]}
    kept = (config["rank_pattern"] or {}).get(KEPT.format(path))
    if kept is None:  # no list of the rank's length: no tensor of that shape has been seen yet
        return settings
    bools = isinstance(kept, list) and all(isinstance(keeps, bool) for keeps in kept)
    if not bools or len(kept) != rank or not any(kept):
        raise UserError(
            f"the adapter's rank_pattern for {path} must be a list of {plural(rank, 'bool')}, some of them true"
        )
    return {**settings, "r": sum(kept), "kept": kept}


def _summary(modules: Mapping[str, Settings], others: Sequence[str], method: Settings) -> dict[str, Any]:
    del method
    rank = max(len(s["kept"]) for s in modules.values())
    scale = max(s["scale"] for s in modules.values())
    if any(abs(s["scale"] - scale) > 1e-6 * scale for s in modules.values()):
        raise UserError("an ADALORA adapter of PEFT has one alpha for all modules, and these differ")
    return {
        "target_modules": match.shortest_ends(modules, others),
        "init_r": rank,
        "target_r": max(1, round(sum(s["r"] for s in modules.values()) / len(modules))),
        "lora_alpha": ranked.undo_rounding(scale * (rank + EPSILON)),
        "lora_dropout": max(s["dropout"] for s in modules.values()),
        "rank_pattern": {KEPT.format(path): s["kept"] for path, s in modules.items()},
        "init_lora_weights": True,
        "total_step": 1,  # PEFT refuses to read an adapter without one
    }


def _peel(w: AdaLoRA, arrays: HostArrays) -> Layer | None:
    """The triplets that were not pruned, in their order."""
    kept = arrays["e"] != 0
    settings = {
        "r": int(kept.sum()),
        "kept": kept.tolist(),
        "scale": float(arrays["scale"]),
        "dropout": w.dropout,
    }
    parts = {"a": arrays["a"][:, kept], "e": arrays["e"][kept], "b": arrays["b"][kept]}
    return Layer(settings, parts) if kept.any() else None


def _grow(base: Any, layers: Sequence[Layer | None]) -> AdaLoRA:
    """The form with each triplet at its index before the others were pruned."""
    present = [layer for layer in layers if layer]
    (n_in, n_out), stack = base.shape[-2:], base.shape[:-2]
    rank = max(
        layer.settings["r"] if layer.settings["kept"] is None else len(layer.settings["kept"]) for layer in present
    )
    shapes = {"a": (n_in, rank), "e": (rank,), "b": (rank, n_out)}
    fields = {name: np.zeros((len(layers), *shape), np.float32) for name, shape in shapes.items()}
    for i, layer in enumerate(layers):
        if layer:
            kept = np.flatnonzero(layer.settings["kept"] or [True] * rank)
            fields["a"][i][:, kept] = layer.arrays["a"]
            fields["e"][i][kept], fields["b"][i][kept] = layer.arrays["e"], layer.arrays["b"]
    return AdaLoRA(
        base=base,
        **{name: jnp.asarray(x.reshape(*stack, *shapes[name])) for name, x in fields.items()},
        scale=jnp.full(stack, present[0].settings["scale"], jnp.float32),
        dropout=present[0].settings["dropout"],
    )


_NOT_READ = ("alpha_pattern", "r", "use_rslora")  # keys of LoRA without effect in PEFT's AdaLoRA

ADALORA = PeftForm(
    peft_type="ADALORA",
    kind=AdaLoRA,
    parts=(
        Part(".lora_A", "a", lambda n_in, n_out, s: (s["r"], n_in)),
        Part(".lora_E", "e", lambda n_in, n_out, s: (s["r"], 1), vector=True),
        Part(".lora_B", "b", lambda n_in, n_out, s: (n_out, s["r"])),
    ),
    flags={},
    obeyed_keys={k: v for k, v in LORA.obeyed_keys.items() if k not in _NOT_READ}
    | {"init_r": 12, "rank_pattern": None},
    ignored_keys=(
        *LORA.ignored_keys,
        *_NOT_READ,
        "beta1",
        "beta2",
        "deltaT",
        "init_lora_weights",
        "orth_reg_weight",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
    ),
    supported={},
    settings=_settings,
    to_layer=_peel,
    from_layers=_grow,
    summary=_summary,
    extra=("scale",),
)
